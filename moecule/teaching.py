"""The commands that train: each parses, calls one function, prints its result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moecule.options import Data, Device, Dtype, Json, Length, Model, Texts, compute_of
from moecule.show import bar, print_change, print_json, say

if TYPE_CHECKING:
    from moecule.result import Result
    from moecule.train.slim import Slimmed

Steps = Annotated[int, typer.Option(help="Of training.")]
BatchSize = Annotated[int, typer.Option("--batch", help="Windows a step, over all processes.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate, at its highest.")]
Every = Annotated[int, typer.Option(help="Steps from one held-out figure to the next.")]
Seed = Annotated[int, typer.Option(help="Of windows and noise.")]
Precision = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="Of products: float32 or bfloat16.")
]
Parts = Annotated[
    str | None,
    typer.Option(help="What moves: scales,router,norms,lora,experts or all.", metavar="A,B"),
]
ExpertsOver = Annotated[
    int, typer.Option(help="Processes that share each layer's experts; torchrun starts them.")
]
RouterSteps = Annotated[
    int, typer.Option(help="Before the others: steps in which routers alone move.")
]
NewRouters = Annotated[
    bool, typer.Option("--new-routers", help="Begin with routers at random (UNCURL).")
]
Balance = Annotated[float, typer.Option(help="Weight of the loss that evens experts.")]
CapacityOf = Annotated[
    float | None,
    typer.Option(help="Tokens that an expert takes, times its even share; without: all."),
]
Selected = Annotated[
    Literal["random", "position", "probs"] | None,
    typer.Option(help="With --capacity, who is taken: by lot (as without), first, or likeliest."),
]


Width = Annotated[int | None, typer.Option(help="Channels that every expert keeps; without: all.")]
Groups = Annotated[
    int | None, typer.Option(help="Key heads that stay, with their queries; without: all.")
]
Stages = Annotated[int, typer.Option(help="Of cutting and distilling.")]
Early = Annotated[float, typer.Option(help="Share of the steps that each stage but the last has.")]
Multiple = Annotated[int, typer.Option(help="Widths between stages are multiples of it.")]
SignalName = Annotated[
    Literal["topk_ce", "lm", "noise"], typer.Option(help="Loss of the first stage's scores.")
]
Full = Annotated[
    bool, typer.Option("--full", help="Score channels by all three slices of weights.")
]
Teacher = Annotated[str | None, typer.Option(help="To learn from; without: the model as it was.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Compute layers twice in training: less memory.")
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep what trains in host memory; a layer on the GPU.")
]


Micro = Annotated[int, typer.Option(help="Windows at a time, where a step's do not fit; 0: all.")]
TopK = Annotated[
    int | None,
    typer.Option(help="Ask the teacher before, layer by layer: its likeliest tokens."),
]
ByLayer = Annotated[
    bool, typer.Option("--by-layer", help="One decoder layer after the other: less memory.")
]


def parts_of(given: str | None) -> tuple[str, ...]:
    """The names between commas."""
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())


def schedule_of(**given: Any) -> Any:
    """A schedule of what was given. Raises RecipeError for what cannot be."""
    from moecule.train.schedule import Schedule

    return Schedule(**{k: v for k, v in given.items() if v is not None})


def heal(
    model: Model,
    teacher: Annotated[str, typer.Option(help="The model to learn from, such as the original.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The healed checkpoint's folder.")],
    parts: Parts = None,
    steps: Steps = 400,
    batch: BatchSize = 16,
    micro: Micro = 0,
    checkpointing: Checkpointing = False,
    offload: Offload = False,
    lr: Rate = None,
    every: Every = 50,
    seed: Seed = 0,
    precision: Precision = "float32",
    top_k: TopK = None,
    by_layer: ByLayer = False,
    experts_over: ExpertsOver = 1,
    data: Data = None,
    text: Texts = None,
    length: Length = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_: Json = False,
) -> None:
    """Teach a compressed model what the original says; never ends worse than it began."""
    from moecule.compress import measured
    from moecule.train.heal import heal as run
    from moecule.train.lesson import Lesson

    compute = compute_of(device, dtype, False)
    schedule = schedule_of(
        steps=steps, batch=batch, micro=micro, lr=lr, every=every, seed=seed, precision=precision
    )
    lesson = Lesson(
        parts_of(parts),
        schedule,
        teaching="auto" if top_k is None else "said",
        top_k=Lesson.top_k if top_k is None else top_k,
        by_layer=by_layer,
        experts_over=experts_over,
        length=length or 0,
        checkpointing=checkpointing,
        offload=offload,
    )
    with bar() as progress:
        made = run(
            model, teacher, out, lesson=lesson, data=data, compute=compute, progress=progress
        )
        before, after = measured(
            out, teacher, text=text or (), data=data, compute=compute, progress=progress
        )
    if json_:
        told = {name: asdict(of) for name, of in made.trained.items()}
        print_json({"result": asdict(after), "healing": told})
        return
    print_change(before, after)
    said = [t for t in made.trained.values() if t.began is not None]
    if len(said) == 1:
        say(f"held-out KL to the teacher: {said[0].began:.4f} -> {said[0].best:.4f} nats")
    say(f"in {made.folder}; next: moecule generate {made.folder} 'Once upon a time'")


def slim(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The slim checkpoint's folder.")],
    width: Width = None,
    groups: Groups = None,
    stages: Stages = 2,
    early: Early = 0.1,
    multiple: Multiple = 32,
    signal: SignalName = "topk_ce",
    full: Full = False,
    teacher: Teacher = None,
    samples: Annotated[int, typer.Option(help="Windows to score on, in each stage.")] = 64,
    steps: Steps = 1200,
    batch: BatchSize = 16,
    micro: Micro = 0,
    lr: Rate = None,
    every: Every = 50,
    seed: Seed = 0,
    precision: Precision = "float32",
    checkpointing: Checkpointing = False,
    offload: Offload = False,
    experts_over: ExpertsOver = 1,
    data: Data = None,
    text: Texts = None,
    length: Length = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_: Json = False,
) -> None:
    """Narrow all experts in stages, distilling after each (SlimMoE); a stock checkpoint."""
    from moecule.compress import measured
    from moecule.train.lesson import Lesson
    from moecule.train.slim import slim as run
    from moecule.train.stages import Slimming

    compute = compute_of(device, dtype, False)
    slimming = Slimming(width, groups, stages, early, multiple, signal, full, samples)
    schedule = schedule_of(
        steps=steps, batch=batch, micro=micro, lr=lr, every=every, seed=seed, precision=precision
    )
    lesson = Lesson(
        (), schedule, experts_over=experts_over, length=length or 0, checkpointing=checkpointing,
        offload=offload,
    )  # fmt: skip
    with bar() as progress:
        made = run(
            model, out, slimming, lesson=lesson, teacher=teacher, data=data, compute=compute,
            progress=progress,
        )  # fmt: skip
        before, after = measured(
            out, model, text=text or (), data=data, compute=compute, progress=progress
        )
    _tell_stages(made, before, after, json_)


def _tell_stages(made: Slimmed, before: Result, after: Result, json_: bool) -> None:
    """What slim leaves."""
    taught = list(zip(made.stages, made.trained, strict=True))
    if json_:
        told = [asdict(s) | {n: asdict(of) for n, of in trained.items()} for s, trained in taught]
        print_json({"result": asdict(after), "stages": told})
        return
    print_change(before, after)
    for stage, trained in taught:
        for of in trained.values():
            say(f"experts of {stage.width}: held-out KL {of.began:.4f} -> {of.best:.4f} nats")
    say(f"in {made.folder}; next: moecule generate {made.folder} 'Once upon a time'")


def train(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The trained checkpoint's folder.")],
    parts: Parts = "all",
    steps: Steps = 400,
    batch: BatchSize = 16,
    micro: Micro = 0,
    lr: Rate = 3e-4,
    every: Every = 50,
    seed: Seed = 0,
    precision: Precision = "float32",
    router_steps: RouterSteps = 0,
    new_routers: NewRouters = False,
    balance: Balance = 0.01,
    capacity: CapacityOf = None,
    select: Selected = None,
    checkpointing: Checkpointing = False,
    offload: Offload = False,
    experts_over: ExpertsOver = 1,
    data: Data = None,
    length: Length = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Train a model on text, as after aggregate or dropping experts; never ends worse than it began."""
    from moecule.errors import RecipeError
    from moecule.train.fit import Fitting, fit
    from moecule.train.lesson import Lesson

    if select is not None and capacity is None:
        raise RecipeError("--select goes with --capacity; give that, such as 1.0, or leave it out")
    schedule = schedule_of(
        steps=steps, batch=batch, micro=micro, lr=lr, every=every, seed=seed, precision=precision
    )
    lesson = Lesson(
        parts_of(parts), schedule, experts_over=experts_over, length=length or 0,
        checkpointing=checkpointing, offload=offload,
    )  # fmt: skip
    fitting = Fitting(lesson, router_steps, new_routers, balance, capacity, select or "random")
    with bar() as progress:
        made = fit(
            model, out, fitting=fitting, data=data, compute=compute_of(device, "float32", False),
            progress=progress,
        )  # fmt: skip
    if json_:
        told = {name: asdict(of) for name, of in made.trained.items()}
        print_json({"checkpoint": str(made.folder), "training": told, "left_out": made.left_out})
        return
    for name, of in made.trained.items():
        say(f"held-out loss, {name}: {of.began:.4f} -> {of.best:.4f} nats, step {of.best_step}")
    if capacity is not None:
        say(f"{made.left_out:.1%} of held-out pairs find no room; the model runs without a limit")
    say(f"in {made.folder}; next: moecule evaluate {made.folder} --against {model}")


def learn(
    model: Annotated[Path, typer.Argument(help="A folder that apply made by a plan with masks.")],
    data: Data = None,
    length: Length = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Teach a compressed model which experts a token may leave out, as its plan asks; in place."""
    from moecule.data import Sampling
    from moecule.train.masks import learn_masks

    with bar() as progress:
        made = learn_masks(
            model,
            data=data,
            sampling=Sampling(length=length or 0),
            compute=compute_of(device, "float32", False),
            progress=progress,
        )
    if json_:
        told = {"keep": made.keep, "kl_nats": made.kl_nats, "learning": asdict(made.trained)}
        print_json({"checkpoint": str(made.folder), **told})
        return
    say(
        f"{100 * made.keep:.1f} % of the pairs of token and expert run with --skip, for a KL of "
        f"{made.kl_nats:.4f} nats to all; next: moecule evaluate {made.folder} --skip"
    )
