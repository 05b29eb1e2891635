"""The commands that look at a model, list what there is, measure and run: as those of making.py."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moecule.options import (
    Bits,
    CacheExperts,
    Chosen,
    Clamp,
    Compiled,
    Context,
    Data,
    Device,
    Dtype,
    Engines,
    Exact,
    ExpertCache,
    Fit,
    Gone,
    Gpus,
    Held,
    Json,
    Length,
    Limit,
    LoadFlag,
    LoadOut,
    Match,
    Memory,
    Model,
    PatternsFile,
    RecipeName,
    Replicas,
    Samples,
    Sets,
    Shots,
    Size,
    SkipFlag,
    StatesAt,
    TaskDir,
    Tasks,
    Texts,
    Trust,
    compute_of,
    recipe_of,
    refuse_beside,
    suite_of,
)
from moecule.show import (
    bar,
    print_change,
    print_json,
    print_one,
    print_table,
    remark,
    say,
    show,
)


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
    load: LoadFlag = False,
    gpus: Gpus = None,
    replicas: Replicas = None,
    cache_experts: CacheExperts = None,
    engine: Engines = None,
    data: Data = None,
    out: LoadOut = None,
    json_: Json = False,
) -> None:
    """Show what a model holds, and what compressing it would take: bytes, bits and time.

    With --load (of a model, or of a folder of statistics): how its experts are used, instead.
    """
    of_load = {"gpus": gpus, "replicas": replicas, "cache_experts": cache_experts, "data": data}
    of_load |= {"engines": engine, "out": out}
    of_plan = {"set": set_, "bits": bits, "size": size, "fit": fit, "drop": drop}
    refuse_beside(load, of_load, of_plan)
    if load:
        how = {"samples": samples, "length": length}
        _load(model, of_load, how, compute_of(device, dtype, False, states), json_)
        return
    from moecule.inspect import inspect as look
    from moecule.inspect import table
    from moecule.verbs import Ask

    found = look(
        model,
        recipe=recipe_of(recipe, set_, samples, length),
        ask=Ask(bits, size, fit, context, drop, clamp),
        compute=compute_of(device, dtype, False, states),
        time=time,
    )
    if json_:
        print_json(asdict(found))
        return
    shown = Table(show_header=False, box=None)
    for row in table(found, recipe):
        shown.add_row(*row)
    show(shown)


def _load(
    model: str, wished: dict[str, Any], how: dict[str, int | None], compute: Any, json_: bool
) -> None:
    from moecule.load import SAMPLING, expert_load, tables

    given = {k: v for k, v in wished.items() if v is not None and k != "out"}
    sampling = replace(SAMPLING, **{k: v for k, v in how.items() if v is not None})
    out = wished["out"] or Path("expert_load.json")
    with bar() as progress:
        found = expert_load(
            model, out, **given, sampling=sampling, compute=compute, progress=progress
        )
    if json_:
        print_json(asdict(found))
        return
    layers, caches = tables(found)
    print_table(layers)
    if found.offloading:
        print_table(caches)
    say(
        f"{out}: the busiest of {found.gpus} GPUs has {found.balance_before:.3f} times the mean to do, and "
        f"{found.balance_after:.3f} times with {found.replicas} replicas a GPU, placed as planned there"
    )


def families(json_: Json = False) -> None:
    """List the model families that are served, and those that are refused and why."""
    from moecule.catalogue import catalogue

    found = catalogue()
    if json_:
        print_json([asdict(family) for family in found])
        return
    print_table([("family", "status", "reason"), *((f.name, f.status, f.reason) for f in found)])


def methods(json_: Json = False) -> None:
    """List the methods: what each does, its paper, and what it was measured to cost."""
    from moecule.listing import listing, rows

    found = listing()
    if json_:
        print_json([asdict(method) for method in found])
        return
    print_table(rows(found))


def recipes(json_: Json = False) -> None:
    """List the recipes: what each does, and its paper."""
    from moecule.listing import recipe_listing, recipe_rows

    found = recipe_listing()
    if json_:
        print_json([asdict(recipe) for recipe in found])
        return
    print_table(recipe_rows(found))


def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The original, for KL and agreement.")] = None,
    text: Texts = None,
    length: Length = None,
    skip: SkipFlag = False,
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    limit: Limit = None,
    shots: Shots = None,
    memory: Memory = None,
    context: Held = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    states: StatesAt = "auto",
    json_: Json = False,
) -> None:
    """Measure loss, size and speed, and tasks."""
    from moecule.evaluate import evaluate as run
    from moecule.files import write_text

    with bar() as progress:
        before, after = run(
            model,
            against=against,
            text=text or (),
            length=length or 0,
            skip=skip,
            suite=suite_of(tasks, task_dir, limit, shots),
            memory=memory,
            context=context,
            compute=compute_of(device, dtype, trust, states),
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


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="What compress made; several are compared first.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write one HTML file, and Markdown beside it: what was done to a model, and what it cost."""
    from moecule.report import report as run

    html, markdown = run(list(folders), out)
    say(f"{html} opens in a browser, from disk; {markdown} is the same for a model card")


def compare(
    folders: Annotated[list[Path], typer.Argument(help="What compress made: two or more.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="An HTML file with the plots, too.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show several compressed models beside each other, if they were measured alike."""
    from moecule.compare import compare as run
    from moecule.compare import text_plot, text_table
    from moecule.report import write_pages

    found = run(list(folders))
    if out is not None:
        write_pages([found.page], out)
    if json_:
        pairs = zip(found.runs, found.gaps, strict=True)
        print_json(
            [
                {"folder": str(one.folder), "to_the_first": asdict(to), **asdict(one.result)}
                for one, to in pairs
            ]
        )
        return
    for text in (text_table(found), text_plot(found.runs)):
        say(f"{text}\n")
    if out is not None:
        say(f"{out} has the plots, {out.with_suffix('.md')} the table")


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
    patterns: PatternsFile = None,
    experts: Chosen = None,
    match: Match = "spread",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    json_: Json = False,
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
        patterns=patterns,
        experts=experts,
        match=match,
        compute=compute_of(device, dtype, trust),
        say=(lambda piece: None) if json_ else write,
    )
    if json_:
        print_json(asdict(made))
        return
    ran = f", {100 * made.experts_run:.1f} % of the experts run" if skip else ""
    line = f"\n{made.tokens} tokens, {made.tokens_per_s:.1f} a second on {made.device}{ran}"
    if made.cache is not None:
        line += (
            f", {100 * made.cache.share:.1f} % of the experts' uses from the expert cache "
            f"({format_size(made.cache.device_bytes)} of {format_size(made.cache.host_bytes)})"
        )
    if made.retrieved is not None:
        found = made.retrieved
        line += (
            f", pattern {found.task}: {found.experts} of {found.of} experts a layer, "
            f"{format_size(found.memory_bytes)} of {format_size(found.whole_bytes)}"
        )
    remark(line)
