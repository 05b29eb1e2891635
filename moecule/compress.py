"""compress: calibrate, plan, apply and evaluate into one folder, going on where it was left."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moecule.checkpoint import check_out
from moecule.errors import OutputError
from moecule.evaluate import Result, evaluate
from moecule.recipe import Recipe, load_recipe
from moecule.session import Compute, Progress, silent
from moecule.verbs import AUTO, NO_WISH, Ask, apply, calibrate, plan, read_plan


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
    done = (out / "config.json").is_file()
    if not done:
        check_out(out, {"stats", "plan.yaml", "result.json"})
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    calibrate(model, out / "stats", recipe=chosen, data=data, compute=compute, progress=progress)
    seconds["calibrate"] = _since(start)
    start = time.perf_counter()
    wanted = plan(out / "stats", recipe=chosen, ask=ask)
    file = out / "plan.yaml"
    if file.is_file():
        found = read_plan(file)
        if found.made_by != wanted.made_by or found.digest != wanted.digest:
            raise OutputError(
                f"{file} was made for another request ({found.made_by.get('recipe')}, "
                f"{found.made_by.get('budget')}); name another folder or remove it"
            )
    else:
        plan(out / "stats", file, recipe=chosen, ask=ask)
    seconds["plan"] = _since(start)
    start = time.perf_counter()
    if not done:
        apply(model, file, out, data=data, sampling=chosen.data, compute=compute, progress=progress)
    seconds["apply"] = _since(start)
    before, after = evaluate(
        out,
        against=model,
        text=text,
        data=data,
        sampling=chosen.data,
        compute=compute,
        progress=progress,
    )
    assert before is not None  # `against` was given
    after = replace(after, seconds={**seconds, **after.seconds}, peak_memory_bytes=peak_memory())
    (out / "result.json").write_text(after.dumps())
    return Compressed(out, before, after)


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def peak_memory() -> dict[str, int]:
    """Bytes that this process has held at most, on the host and on the device."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"host": host, "device": device}
