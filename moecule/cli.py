"""The command line: each verb parses, calls one function, prints its result."""

from __future__ import annotations

import json
import sys
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from moecule.errors import MoeculeError, RecipeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Make Mixture-of-Experts models small, with proof of what it cost.",
)
# no markup: a path may hold [brackets]
out_console, err_console = Console(markup=False), Console(markup=False, stderr=True)

Model = Annotated[
    str, typer.Argument(help="A folder, a Hub id in the cache, or: embedded.", metavar="MODEL")
]
RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe by name, or a .toml file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key: encode.damp=0.05", metavar="KEY=VALUE"),
]
Data = Annotated[Path | None, typer.Option(help="Calibration text: plain or JSON lines, also .xz.")]
Samples = Annotated[int | None, typer.Option(help="Calibration windows.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a window.")]
Bits = Annotated[
    float | None, typer.Option(help="Mean code bits over the routed experts' weights.")
]
Size = Annotated[str | None, typer.Option(help="True bytes of the checkpoint: 20GB, 16GiB.")]
Fit = Annotated[str | None, typer.Option(help="As --size, with a KV cache of --context tokens.")]
Context = Annotated[int, typer.Option(help="Tokens of the KV cache that --fit leaves room for.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Texts = Annotated[
    list[Path] | None, typer.Option("--text", help="Text to evaluate on; may repeat.")
]
SkipFlag = Annotated[bool, typer.Option("--skip", help="With the online skipping saved in it.")]


@app.command()
def inspect(
    model: Model, recipe: RecipeName = "mc", device: Device = "auto", json_: Json = False
) -> None:
    """Show what a model holds, and what compressing it would take."""
    from moecule.inspect import inspect as look
    from moecule.inspect import table
    from moecule.session import Compute

    found = look(model, recipe=recipe, compute=Compute(device))
    if json_:
        _print_json(asdict(found))
        return
    shown = Table(show_header=False, box=None)
    for row in table(found, recipe):
        shown.add_row(*row)
    out_console.print(shown)


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
) -> None:
    """Count over text what a recipe's methods read."""
    from moecule import verbs

    chosen = _recipe(recipe, set_, samples, length)
    with _bar() as progress:
        made = verbs.calibrate(
            model,
            out,
            recipe=chosen,
            data=data,
            compute=_compute(device, dtype, trust),
            progress=progress,
        )
    _say(f"statistics in {made}; next: moecule plan {made} -o plan.yaml --recipe {recipe}")


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
) -> None:
    """Decide what becomes of every expert; the plan is text to read and edit."""
    from moecule import verbs
    from moecule.budget import Inventory, bytes_by_part, format_size
    from moecule.stats import load_stats

    made = verbs.plan(
        stats,
        out,
        recipe=_recipe(recipe, set_, None, None),
        ask=verbs.Ask(bits, size, fit, context),
    )
    inventory = Inventory.from_dict(load_stats(stats)[1]["inventory"])
    parts = bytes_by_part(inventory, made)
    true = 8 * parts["experts"] / inventory.expert_weights
    _say(
        f"{out}: {made.nominal_bits:.3f} nominal bits, {true:.3f} true bits a routed expert's weight, "
        f"{format_size(sum(parts.values()))} in all; next: moecule apply {made.model} {out} -o OUT"
    )


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
) -> None:
    """Carry a plan out, and check in a fresh process that the result loads and computes."""
    from moecule import verbs
    from moecule.data import Sampling

    given = {k: v for k, v in (("samples", samples), ("length", length)) if v is not None}
    with _bar() as progress:
        made = verbs.apply(
            model,
            plan,
            out,
            data=data,
            sampling=Sampling(**given),
            compute=_compute(device, dtype, trust),
            progress=progress,
        )
    _say(f"compressed checkpoint in {made}; next: moecule evaluate {made} --against {model}")


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
    data: Data = None,
    text: Texts = None,
    samples: Samples = None,
    length: Length = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Calibrate, plan, apply and evaluate; goes on where it was left."""
    from moecule.compress import compress as run
    from moecule.verbs import Ask

    chosen = _recipe(recipe, set_, samples, length)
    with _bar() as progress:
        made = run(
            model,
            out,
            recipe=chosen,
            ask=Ask(bits, size, fit, context),
            data=data,
            text=text or (),
            compute=_compute(device, dtype, trust),
            progress=progress,
        )
    if json_:
        _print_json(asdict(made.after))
        return
    _print_change(made.before, made.after)
    _say(f"in {made.folder}; next: moecule generate {made.folder} 'Once upon a time'")


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
    json_: Json = False,
) -> None:
    """Measure loss, size and speed."""
    from moecule.evaluate import evaluate as run
    from moecule.files import write_text

    with _bar() as progress:
        before, after = run(
            model,
            against=against,
            text=text or (),
            length=length or 0,
            skip=skip,
            compute=_compute(device, dtype, trust),
            progress=progress,
        )
    if json_:
        _print_json(asdict(after))
    elif before is not None:
        _print_change(before, after)
    else:
        _print_one(after)
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
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
) -> None:
    """Print text as the model makes it, and tokens a second."""
    from moecule.generate import generate as run

    def say(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    made = run(
        model,
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        skip=skip,
        compute=_compute(device, dtype, trust),
        say=say,
    )
    ran = f", {100 * made.experts_run:.1f} % of the experts run" if skip else ""
    line = f"\n{made.tokens} tokens, {made.tokens_per_s:.1f} a second on {made.device}{ran}"
    err_console.print(line, soft_wrap=True)


def _compute(device: str, dtype: str, trust: bool) -> Any:
    from moecule.session import Compute

    return Compute(device, dtype, trust)


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


def _say(line: str) -> None:
    """As one line, however long, so that the command in it can be copied."""
    out_console.print(line, soft_wrap=True)


def _print_json(doc: Any) -> None:
    sys.stdout.write(json.dumps(doc, indent=2) + "\n")


def _print_change(before: Any, after: Any) -> None:
    from moecule.evaluate import table

    shown = Table(title=f"{after.against} -> {after.model} ({after.device}, {after.dtype})")
    for name in ("", "before", "after", "change"):
        shown.add_column(name, justify="left" if not name else "right")
    for row in table(before, after):
        shown.add_row(*row)
    if len(after.by_file) > 1:
        for name, loss in after.by_file.items():
            change = loss.loss_nats - loss.original_loss_nats
            shown.add_row(
                f"  loss on {name}",
                f"{loss.original_loss_nats:.4f}",
                f"{loss.loss_nats:.4f}",
                f"{change:+.4f}",
            )
    out_console.print(shown)


def _print_one(result: Any) -> None:
    shown = Table(show_header=False, box=None)
    for name, value in asdict(result).items():
        if isinstance(value, (int, float, str)):
            shown.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    for name, loss in result.by_file.items():
        shown.add_row(f"loss on {name}", f"{loss.loss_nats:.4f}")
    out_console.print(shown)


@contextmanager
def _bar() -> Iterator[Any]:
    """A bar on a terminal; elsewhere a plain line at every tenth of the way."""
    if not err_console.is_terminal:
        tenths: dict[str, int] = {}

        def line(what: str, done: int, of: int) -> None:
            tenth = 10 * done // max(of, 1)
            if tenth > tenths.setdefault(what, 0):
                tenths[what] = tenth
                err_console.print(f"{what} {done}/{of}")

        yield line
        return
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=err_console) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done)

        yield progress


def main() -> None:
    """Run a verb; a user's mistake is one line and exit code 2."""
    warnings.showwarning = lambda message, *args, **kwargs: _complain("warning", message, "yellow")
    try:
        app()
    except MoeculeError as e:
        _complain("moecule", e, "red")
        sys.exit(2)
    except OSError as e:
        _complain("moecule", f"{e.filename}: {e.strerror}" if e.filename else e, "red")
        sys.exit(2)


def _complain(who: str, what: object, style: str) -> None:
    """One line, whatever the text was wrapped from."""
    line = " ".join(f"{who}: {what}".split())
    err_console.print(line, style=style, soft_wrap=True, highlight=False)
