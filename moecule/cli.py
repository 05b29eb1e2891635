"""The command line: each verb parses, calls one function, prints its result."""

from __future__ import annotations

import os
import sys
import tomllib
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moecule.errors import MoeculeError, RecipeError
from moecule.interrupt import Verbs
from moecule.options import (
    Bits,
    Clamp,
    Compiled,
    Context,
    Data,
    Device,
    Dtype,
    Exact,
    ExpertCache,
    Fit,
    Gone,
    Json,
    Length,
    Model,
    RecipeName,
    Samples,
    Sets,
    Size,
    SkipFlag,
    StatesAt,
    Texts,
    Trust,
    Where,
)
from moecule.show import (
    bar,
    complain,
    err_console,
    out_console,
    print_change,
    print_json,
    print_one,
    print_table,
    say,
)

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Make Mixture-of-Experts models small, with proof of what it cost.",
)


@app.command()
def inspect(
    model: Model,
    recipe: RecipeName = "mc",
    set_: Sets = None,
    bits: Bits = None,
    size: Size = None,
    fit: Fit = None,
    context: Context = 4096,
    drop: Gone = None,
    clamp: Clamp = False,
    samples: Samples = None,
    length: Length = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    states: StatesAt = "auto",
    time: Annotated[bool, typer.Option(help="Measure rates and estimate the time.")] = True,
    json_: Json = False,
) -> None:
    """Show what a model holds, and what compressing it would take: bytes, bits and time."""
    from moecule.inspect import inspect as look
    from moecule.inspect import table
    from moecule.verbs import Ask

    found = look(
        model,
        recipe=_recipe(recipe, set_, samples, length),
        ask=Ask(bits, size, fit, context, drop, clamp),
        compute=_compute(device, dtype, False, states),
        time=time,
    )
    if json_:
        print_json(asdict(found))
        return
    shown = Table(show_header=False, box=None)
    for row in table(found, recipe):
        shown.add_row(*row)
    out_console.print(shown)


@app.command()
def families(json_: Json = False) -> None:
    """List the model families that are served, and those that are refused and why."""
    from moecule.catalogue import catalogue

    found = catalogue()
    if json_:
        print_json([asdict(family) for family in found])
        return
    print_table([("family", "status", "reason"), *((f.name, f.status, f.reason) for f in found)])


@app.command()
def methods(json_: Json = False) -> None:
    """List the methods: what each does, its paper, and what it was measured to cost."""
    from moecule.listing import listing, rows

    found = listing()
    if json_:
        print_json([asdict(method) for method in found])
        return
    print_table(rows(found))


@app.command()
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
) -> None:
    """Count over text what a recipe's methods read."""
    from moecule import verbs

    chosen = _recipe(recipe, set_, samples, length)
    with bar() as progress:
        made = verbs.calibrate(
            model,
            out,
            recipe=chosen,
            data=data,
            compute=_compute(device, dtype, trust, states),
            progress=progress,
        )
    say(f"statistics in {made}; next: moecule plan {made} -o plan.yaml --recipe {recipe}")


@app.command()
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
) -> None:
    """Decide what becomes of every expert; the plan is text to read and edit."""
    from moecule import verbs
    from moecule.budget import Inventory, bytes_by_part, format_size, weights_left
    from moecule.stats import load_stats

    made = verbs.plan(
        stats,
        out,
        recipe=_recipe(recipe, set_, None, None),
        ask=verbs.Ask(bits, size, fit, context, drop, clamp),
    )
    inventory = Inventory.from_dict(load_stats(stats)[1]["inventory"])
    parts = bytes_by_part(inventory, made)
    true = 8 * parts["experts"] / inventory.expert_weights
    gone = f"{made.dropped} experts dropped, " if made.dropped else ""
    if made.narrowed:
        gone = f"{1 - weights_left(inventory, made):.4g} of the experts' weights dropped, "
    width = f"{made.nominal_bits:.3f} nominal bits, {true:.3f} true bits a routed expert's weight"
    size = f"{format_size(sum(parts.values()))} in all"
    say(f"{out}: {gone}{width}, {size}; next: moecule apply {made.model} {out} -o OUT")


@app.command()
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
) -> None:
    """Carry a plan out, and check in a fresh process that the result loads and computes."""
    from moecule import verbs
    from moecule.data import Sampling

    given = {k: v for k, v in (("samples", samples), ("length", length)) if v is not None}
    with bar() as progress:
        made = verbs.apply(
            model,
            plan,
            out,
            data=data,
            sampling=Sampling(**given),
            compute=_compute(device, dtype, trust, states),
            progress=progress,
        )
    say(f"compressed checkpoint in {made}; next: moecule evaluate {made} --against {model}")


@app.command()
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

    chosen = _recipe(recipe, set_, samples, length)
    with bar() as progress:
        made = run(
            model,
            out,
            recipe=chosen,
            ask=Ask(bits, size, fit, context, drop, clamp),
            data=data,
            text=text or (),
            compute=_compute(device, dtype, trust, states),
            progress=progress,
        )
    if json_:
        print_json(asdict(made.after))
        return
    print_change(made.before, made.after)
    say(f"in {made.folder}; next: moecule generate {made.folder} 'Once upon a time'")


@app.command()
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The original, for KL and agreement.")] = None,
    text: Texts = None,
    length: Length = None,
    skip: SkipFlag = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    states: StatesAt = "auto",
    json_: Json = False,
) -> None:
    """Measure loss, size and speed."""
    from moecule.evaluate import evaluate as run
    from moecule.files import write_text

    with bar() as progress:
        before, after = run(
            model,
            against=against,
            text=text or (),
            length=length or 0,
            skip=skip,
            compute=_compute(device, dtype, trust, states),
            progress=progress,
        )
    if json_:
        print_json(asdict(after))
    elif before is not None:
        print_change(before, after)
    else:
        print_one(after)
    if (Path(model) / "plan.yaml").is_file():
        write_text(Path(model) / "result.json", after.dumps())


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to go on from, or to answer.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    skip: SkipFlag = False,
    exact: Exact = False,
    compiled: Compiled = False,
    expert_cache: ExpertCache = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
) -> None:
    """Print text as the model makes it, and tokens a second."""
    from moecule.budget import format_size
    from moecule.generate import generate as run

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    made = run(
        model,
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        skip=skip,
        exact=exact,
        compiled=compiled,
        expert_cache=expert_cache,
        compute=_compute(device, dtype, trust),
        say=write,
    )
    ran = f", {100 * made.experts_run:.1f} % of the experts run" if skip else ""
    line = f"\n{made.tokens} tokens, {made.tokens_per_s:.1f} a second on {made.device}{ran}"
    if made.cache is not None:
        line += (
            f", {100 * made.cache.share:.1f} % of the experts' uses from the expert cache "
            f"({format_size(made.cache.device_bytes)} of {format_size(made.cache.host_bytes)})"
        )
    err_console.print(line, soft_wrap=True)


def _compute(device: str, dtype: str, trust: bool, states: Where = "auto") -> Any:
    from moecule.session import Compute

    return Compute(device, dtype, trust, states).joined()


def _recipe(name: str, sets: list[str] | None, samples: int | None, length: int | None) -> Any:
    from moecule.recipe import load_recipe

    changes: dict[str, Any] = {}
    for item in sets or []:
        key, found, value = item.partition("=")
        if not found:
            raise RecipeError(f"--set {item!r}: wanted KEY=VALUE, like encode.damp=0.05")
        try:
            changes[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = value.strip()
    if samples is not None:
        changes["data.samples"] = samples
    if length is not None:
        changes["data.length"] = length
    return load_recipe(name, changes)


def main() -> None:
    """Run a verb; a user's mistake is one line and exit code 2."""
    warnings.showwarning = lambda message, *args, **kwargs: complain("warning", message, "yellow")
    if os.environ.get("RANK", "0") != "0":  # one of several processes tells the story
        out_console.quiet, err_console.quiet = True, True
    try:
        app()
        if "torch" in sys.modules:
            _leave()
    except MoeculeError as e:
        complain("moecule", e, "red")
        sys.exit(e.code)
    except OSError as e:
        complain("moecule", f"{e.filename}: {e.strerror}" if e.filename else e, "red")
        sys.exit(2)


def _leave() -> None:
    from moecule.ranks import leave

    leave()
