"""compress: calibrate, plan, apply and evaluate into one folder, going on where it was left."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from moecule.apply import check_target, key_of
from moecule.ask import Ask, foresee
from moecule.data import Sampling
from moecule.errors import OutputError
from moecule.evaluate import evaluate
from moecule.evidence import gather, load_evidence, noting, save_evidence
from moecule.files import write_text
from moecule.folder import remains
from moecule.inventory import take_inventory
from moecule.journal import only_one, placed, sweep
from moecule.method import load_method
from moecule.order import save_plan
from moecule.plan import Masks
from moecule.recipe import Recipe, load_recipe
from moecule.result import Result, load_result
from moecule.session import Compute, Progress, open_checkpoint, silent, stream
from moecule.text import evaluation_batches
from moecule.train.masks import check_text, learn_masks
from moecule.verbs import AUTO, NO_WISH, apply, calibrate, plan, read_plan
from moecule.writer import check_out

LOSSES = "losses"  # in the folder: what evaluating goes on from lies beside this name


@dataclass(frozen=True)
class Compressed:
    """What compress leaves: the folder, and both models measured on the same text."""

    folder: Path
    before: Result
    after: Result


def compress(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "mc",
    ask: Ask = NO_WISH,
    data: str | Path | None = None,
    text: Sequence[str | Path] = (),
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> Compressed:
    """Make a compressed checkpoint in `out` and measure it against the original.

    What `out` holds already of the same request is kept: statistics, a plan (edited or not), the
    checkpoint. Raises OutputError where it holds what another request made, and what the verbs raise.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    out = Path(out)
    _check(model, out, chosen, ask, data, text, compute)
    with only_one(out, compute.ranks, "compress.lock"), noting() as said:
        earlier = load_evidence(out) if compute.ranks.is_first else None
        made = _compress(model, out, chosen, ask, data, text, compute, progress)
        if compute.ranks.is_first:
            save_evidence(gather(out, read_plan(out / "plan.yaml"), said, earlier), out)
    return made


def _compress(
    model: str | Path,
    out: Path,
    chosen: Recipe,
    ask: Ask,
    data: str | Path | None,
    text: Sequence[str | Path],
    compute: Compute,
    progress: Progress,
) -> Compressed:
    ranks = compute.ranks
    done = ranks.share(_is_done(out), 0)
    if done:
        sweep(out, ranks, whole=True)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    calibrate(model, out / "stats", recipe=chosen, data=data, compute=compute, progress=progress)
    seconds["calibrate"] = _since(start)
    start = time.perf_counter()
    if ranks.is_first:
        _planned(out, chosen, ask)
    ranks.wait()
    file = out / "plan.yaml"
    seconds["plan"] = _since(start)
    start = time.perf_counter()
    if not done:
        apply(model, file, out, data=data, sampling=chosen.data, compute=compute, progress=progress)
    seconds["apply"] = _since(start)
    start = time.perf_counter()
    if isinstance(read_plan(file).skip, Masks):
        learn_masks(out, data=data, sampling=chosen.data, compute=compute, progress=progress)
        seconds["learn"] = _since(start)
    before, after = measured(
        out,
        model,
        text=text,
        data=data,
        sampling=chosen.data,
        compute=compute,
        progress=progress,
        seconds=seconds,
    )
    return Compressed(out, before, after)


def measured(
    out: Path,
    against: str | Path,
    *,
    text: Sequence[str | Path] = (),
    data: str | Path | None = None,
    sampling: Sampling | None = None,
    compute: Compute = AUTO,
    progress: Progress = silent,
    seconds: Mapping[str, float] | None = None,
) -> tuple[Result, Result]:
    """(the original's result, that of the model in `out`), which is written there as result.json.

    A killed run goes on. Raises what `evaluate` raises.
    """
    before, after = evaluate(
        out,
        against=against,
        text=text,
        data=data,
        sampling=sampling,
        compute=compute,
        progress=progress,
        beside=out / LOSSES,
    )
    assert before is not None  # `against` was given
    spent = {**(seconds or {}), **after.seconds}
    after = replace(after, seconds=spent, peak_memory_bytes=peak_memory())
    if compute.ranks.is_first:
        write_text(out / "result.json", after.dumps())
    sweep(out / LOSSES, compute.ranks, whole=True)
    return before, after


def _check(
    model: str | Path,
    out: Path,
    recipe: Recipe,
    ask: Ask,
    data: str | Path | None,
    text: Sequence[str | Path],
    compute: Compute,
) -> None:
    """Raise what can be known to be wrong before any work."""
    path = open_checkpoint(model).path
    if compute.ranks.is_first and not _is_done(out):
        check_out(out, remains(out, path) | placed(out))
    streamed = stream(model, compute, empty=True)
    inventory = take_inventory(streamed)
    ask.check(recipe, inventory)
    if ask.target is not None:
        foreseen = replace(foresee(recipe, ask, inventory), made_by={"target": ask.target})
        check_target(foreseen, key_of(streamed, foreseen), streamed.family)
    learns = None if recipe.skip is None else load_method(recipe.skip.method, "needs").learn
    if learns is not None and data is not None:
        check_text(data)
    if text:
        evaluation_batches(streamed.model.config, path, text, 0, None, recipe.data)


def _is_done(out: Path) -> bool:
    """Whether the checkpoint is in place."""
    return (out / "config.json").is_file() and (out / "plan.yaml").is_file()


def _planned(out: Path, recipe: Recipe, ask: Ask) -> None:
    """Write the plan's file if it is not there. Raises OutputError for another request's."""
    wanted, file = plan(out / "stats", recipe=recipe, ask=ask), out / "plan.yaml"
    if not file.is_file():
        save_plan(wanted, file)
        return
    found, result = read_plan(file), out / "result.json"
    if found.made_by != wanted.made_by or found.digest != wanted.digest:
        raise OutputError(
            f"{file} was made for another request ({found.made_by.get('recipe')}, "
            f"{found.made_by.get('budget')}); name another folder or remove it"
        )
    made = (out / "config.json").is_file() and result.is_file()
    if made and load_result(result).plan_digest != found.code_digest:
        raise OutputError(
            f"{file} was edited after the model beside it was made; remove config.json and "
            "*.safetensors there to apply it, or name another folder"
        )


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def peak_memory() -> dict[str, int]:
    """Bytes that this process has held at most, on the host and on the device."""
    if sys.platform == "win32":
        host = int(psutil.Process().memory_info().peak_wset)
    else:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        host = most if sys.platform == "darwin" else 1024 * most
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"host": host, "device": device}
