"""The commands that train: each parses, calls one function, prints its result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moecule.options import Data, Device, Dtype, Json, Length, Model, Texts, compute_of
from moecule.show import bar, print_change, print_json, say

Steps = Annotated[int, typer.Option(help="Of training.")]
BatchSize = Annotated[int, typer.Option("--batch", help="Windows a step, over all processes.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate, at its highest.")]
Every = Annotated[int, typer.Option(help="Steps from one held-out figure to the next.")]
Seed = Annotated[int, typer.Option(help="Of windows and noise.")]
Precision = Annotated[str, typer.Option(help="Of products: float32 or bfloat16.")]
Parts = Annotated[
    str | None,
    typer.Option(help="What moves: scales,router,norms,lora,experts or all.", metavar="A,B"),
]
ExpertsOver = Annotated[
    int, typer.Option(help="Processes that share each layer's experts; torchrun starts them.")
]


def parts_of(given: str | None) -> tuple[str, ...]:
    """The names between commas."""
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())


def schedule_of(**given: Any) -> Any:
    """A schedule of what was given. Raises RecipeError for what cannot be."""
    from moecule.train.loop import Schedule

    return Schedule(**{k: v for k, v in given.items() if v is not None})


def heal(
    model: Model,
    teacher: Annotated[str, typer.Option(help="The model to learn from, such as the original.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The healed checkpoint's folder.")],
    parts: Parts = None,
    steps: Steps = 400,
    batch: BatchSize = 16,
    lr: Rate = None,
    every: Every = 50,
    seed: Seed = 0,
    precision: Precision = "float32",
    top_k: Annotated[
        int | None,
        typer.Option(help="Ask the teacher before, layer by layer: its likeliest tokens."),
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option("--by-layer", help="One decoder layer after the other: less memory."),
    ] = False,
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
    from moecule.train.heal import Lesson
    from moecule.train.heal import heal as run

    compute = compute_of(device, dtype, False)
    lesson = Lesson(
        parts_of(parts),
        schedule_of(steps=steps, batch=batch, lr=lr, every=every, seed=seed, precision=precision),
        teaching="auto" if top_k is None else "said",
        top_k=top_k or Lesson.top_k,
        by_layer=by_layer,
        experts_over=experts_over,
        length=length or 0,
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
