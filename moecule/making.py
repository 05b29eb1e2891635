"""The commands that make a checkpoint: each parses, calls one function, prints its result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from moecule.options import (
    Bits,
    Clamp,
    Context,
    Data,
    Device,
    Domains,
    Dtype,
    Fit,
    Gone,
    Json,
    Length,
    Model,
    RecipeName,
    Samples,
    Sets,
    Size,
    StatesAt,
    Target,
    Texts,
    Trust,
    compute_of,
    domains_of,
    recipe_of,
)
from moecule.show import bar, print_change, print_json, print_table, say


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The stats folder.")],
    recipe: RecipeName = "mc",
    set_: Sets = None,
    data: Data = None,
    samples: Samples = None,
    length: Length = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    states: StatesAt = "auto",
    json_: Json = False,
) -> None:
    """Count over text what a recipe's methods read."""
    from moecule import verbs

    chosen = recipe_of(recipe, set_, samples, length)
    with bar() as progress:
        made = verbs.calibrate(
            model,
            out,
            recipe=chosen,
            data=data,
            compute=compute_of(device, dtype, trust, states),
            progress=progress,
        )
    if json_:
        print_json({"stats": str(made)})
        return
    say(f"statistics in {made}; next: moecule plan {made} -o plan.yaml --recipe {recipe}")


def plan(
    stats: Annotated[Path, typer.Argument(help="What calibrate made.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The plan's file.")],
    recipe: RecipeName = "mc",
    set_: Sets = None,
    bits: Bits = None,
    size: Size = None,
    fit: Fit = None,
    context: Context = 4096,
    drop: Gone = None,
    clamp: Clamp = False,
    target: Target = None,
    json_: Json = False,
) -> None:
    """Decide what becomes of every expert; the plan is text to read and edit."""
    from moecule import verbs
    from moecule.budget import Inventory, bytes_by_part, format_size, weights_left
    from moecule.stats import load_stats

    made = verbs.plan(
        stats,
        out,
        recipe=recipe_of(recipe, set_, None, None),
        ask=verbs.Ask(bits, size, fit, context, drop, clamp, target),
    )
    inventory = Inventory.from_dict(load_stats(stats)[1]["inventory"])
    parts = bytes_by_part(inventory, made)
    true = 8 * parts["experts"] / inventory.expert_weights
    if json_:
        sizes = {"nominal_bits": made.nominal_bits, "bits_per_weight": true, "bytes_by_part": parts}
        print_json({"plan": str(out), **sizes, "dropped": made.dropped, "narrowed": made.narrowed})
        return
    gone = f"{made.dropped} experts dropped, " if made.dropped else ""
    if made.narrowed:
        gone = f"{1 - weights_left(inventory, made):.4g} of the experts' weights dropped, "
    width = f"{made.nominal_bits:.3f} nominal bits, {true:.3f} true bits a routed expert's weight"
    size = f"{format_size(sum(parts.values()))} in all"
    say(f"{out}: {gone}{width}, {size}; next: moecule apply {made.model} {out} -o OUT")


def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="What plan made, edited or not.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The compressed checkpoint's folder.")],
    data: Data = None,
    samples: Samples = None,
    length: Length = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    states: StatesAt = "auto",
    json_: Json = False,
) -> None:
    """Carry a plan out, and check in a fresh process that the result loads and computes."""
    from moecule import verbs
    from moecule.data import Sampling
    from moecule.plan import Masks

    given = {k: v for k, v in (("samples", samples), ("length", length)) if v is not None}
    with bar() as progress:
        made = verbs.apply(
            model,
            plan,
            out,
            data=data,
            sampling=Sampling(**given),
            compute=compute_of(device, dtype, trust, states),
            progress=progress,
        )
    if json_:
        print_json({"checkpoint": str(made)})
        return
    learns = isinstance(verbs.read_plan(plan).skip, Masks)
    after = f"learn {made}" if learns else f"evaluate {made} --against {model}"
    say(f"compressed checkpoint in {made}; next: moecule {after}")


def compress(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The compressed checkpoint's folder.")],
    recipe: RecipeName = "mc",
    set_: Sets = None,
    bits: Bits = None,
    size: Size = None,
    fit: Fit = None,
    context: Context = 4096,
    drop: Gone = None,
    clamp: Clamp = False,
    target: Target = None,
    data: Data = None,
    text: Texts = None,
    samples: Samples = None,
    length: Length = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    states: StatesAt = "auto",
    json_: Json = False,
) -> None:
    """Calibrate, plan, apply and evaluate; goes on where it was left."""
    from moecule.compress import compress as run
    from moecule.verbs import Ask

    chosen = recipe_of(recipe, set_, samples, length)
    with bar() as progress:
        made = run(
            model,
            out,
            recipe=chosen,
            ask=Ask(bits, size, fit, context, drop, clamp, target),
            data=data,
            text=text or (),
            compute=compute_of(device, dtype, trust, states),
            progress=progress,
        )
    if json_:
        print_json(asdict(made.after))
        return
    print_change(made.before, made.after)
    say(f"in {made.folder}; next: moecule generate {made.folder} 'Once upon a time'")


def patterns(
    model: Model,
    domain: Domains,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file of patterns.")],
    recipe: RecipeName = "premoe",
    set_: Sets = None,
    samples: Samples = None,
    length: Length = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Find which experts several domains want, for generate to load those of a prompt's."""
    from moecule.taer import patterns as run

    with bar() as progress:
        made = run(
            model,
            out,
            domains_of(domain),
            recipe=recipe_of(recipe, set_, samples, length),
            compute=compute_of(device, dtype, trust),
            progress=progress,
        )
    n = made.tasks[0].ranks.shape[1]
    if json_:
        tasks = {t.name: t.windows for t in made.tasks}
        print_json({"patterns": str(out), "windows": tasks, "experts": n})
        return
    say(
        f"{len(made.tasks)} patterns in {out}; next: moecule generate {model} 'Once upon a time' "
        f"--patterns {out} --experts N, of {n}"
    )


def aggregate(
    models: Annotated[
        list[str], typer.Argument(help="Models of one family and shape.", metavar="A B...")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The larger checkpoint's folder.")],
    dense: Annotated[
        Literal["average", "first"],
        typer.Option(help="What is no expert's: the mean of all, or the first one's."),
    ] = "average",
    top_k: Annotated[
        int | None,
        typer.Option(help="Experts picked for a token; without: as many as all models together."),
    ] = None,
    center: Annotated[
        bool, typer.Option("--center", help="Even routers: the mean of a model's logits is 0.")
    ] = False,
    json_: Json = False,
) -> None:
    """Make one larger model of several, with the experts of all: a start for training."""
    from moecule.aggregate import aggregate as run

    with bar() as progress:
        made = run(models, out, dense=dense, top_k=top_k, center=center, progress=progress)
    if json_:
        print_json({"checkpoint": str(made.folder), "experts": made.experts, "top_k": made.top_k})
        return
    say(
        f"{made.experts} experts a layer, {made.top_k} picked, in {made.folder}; next: moecule train "
        f"{made.folder} -o OUT --data F"
    )


def export(
    model: Annotated[str, typer.Argument(help="What compress or apply made, or a stock folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for the other engine.")],
    to: Annotated[
        str,
        typer.Option(
            help="gguf: llama.cpp; compressed-tensors: vLLM; auto-round; transformers: 16 bits."
        ),
    ],
    type_: Annotated[
        list[str] | None,
        typer.Option("--type", help="gguf: store a width as a type: 2=Q2_K.", metavar="BITS=TYPE"),
    ] = None,
    json_: Json = False,
) -> None:
    """Write a compressed model as another engine reads it."""
    from moecule.export import export as run
    from moecule.export import table

    with bar() as progress:
        made = run(model, out, to, types=type_ or (), progress=progress)
    if json_:
        print_json(asdict(made))
        return
    print_table(table(made))
    for what in made.left_out:
        say(f"left out: {what}")
    say(f"in {made.folder}: {made.checked}")


def cloze(
    text: Annotated[
        list[Path], typer.Argument(help="Held-out text, as --data.", metavar="TEXT...")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of task files.")],
    items: Annotated[int, typer.Option(help="Of each task, at most.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Make tasks of held-out text: the last word of passages, and which of four goes on."""
    from moecule.cloze import cloze as run

    made = run(text, out, items=items, seed=seed)
    say(
        f"{sum(made.items.values())} items of {len(made.items)} tasks in {out}; next: moecule evaluate "
        f"MODEL --task-dir {out}"
    )
