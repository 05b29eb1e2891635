"""evaluate: what a compressed model lost, what it weighs and how fast it is, as a Result.

Over several files the loss is the mean of the files' losses, so that a long file does not drown
a short one. `measure.py` has the conventions.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moecule.batch import Batch, n_predicted, n_tokens, shape_of, text_tokens
from moecule.data import Sampling
from moecule.errors import CheckpointError, DataError, PlanError
from moecule.hf import Streamed
from moecule.inventory import weigh
from moecule.journal import Trail
from moecule.measure import Loss, batch_sums, device_name, loss_of, speed
from moecule.online import experts_run
from moecule.plan import Plan
from moecule.result import Result, mean_loss
from moecule.session import (
    Compute,
    Progress,
    fits,
    load,
    memory_bytes,
    silent,
    stream_any,
    ticker,
    trail_of,
)
from moecule.text import evaluation_batches
from moecule.walk import finish, walk

MOST_NATS = 700.0  # exp() of more is no float, and no model that computes is so bad


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: Sequence[str | Path] = (),
    length: int = 0,
    data: str | Path | None = None,
    sampling: Sampling | None = None,
    skip: bool = False,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[Result | None, Result]:
    """(the original's result if `against` names it, the model's), over the same windows.

    `text`: files to evaluate on, each whole. Without any: windows of the calibration text `data`
    that calibration did not see, or without that the package's own evaluation text.
    Raises DataError for text that is too short, CheckpointError for an original of another
    vocabulary, and what opening the models raises.
    """
    compute = compute or Compute()
    streamed = stream_any(model, compute, skip=skip)
    original = None if against is None else stream_any(against, compute)
    _check_vocabularies(streamed, original, against)
    path, config = streamed.checkpoint.path, streamed.model.config
    given = evaluation_batches(config, path, text, length, data, sampling or Sampling())
    start = time.perf_counter()
    by_file = _losses(streamed, original, given, compute, progress)
    seconds = {"evaluate": round(time.perf_counter() - start, 2)}
    prompt = text_tokens(next(iter(given.values()))[0])
    longest = max(shape_of(of)[1] for of in given.values())
    names = (str(model), None if against is None else str(against))
    rates = _speed(model, streamed, prompt, compute, skip=skip)
    after = _result(streamed, by_file, longest, names, rates, seconds)
    if against is None or original is None:
        return None, after
    theirs = {
        name: Loss(r.original_loss_nats or 0.0, r.tokens, 0.0, 1.0, r.original_loss_nats)
        for name, r in by_file.items()
    }
    rates = _speed(against, original, prompt, compute)
    return _result(original, theirs, longest, (str(against), None), rates, {}), after


def _losses(
    streamed: Streamed,
    original: Streamed | None,
    given: Mapping[str, list[Batch]],
    compute: Compute,
    progress: Progress,
) -> dict[str, Loss]:
    """By file. One decoder layer is in memory at a time, of one model after the other."""
    models = [m for m in (streamed, original) if m is not None]
    batches = [(name, batch) for name, of in given.items() for batch in of]
    mine = compute.ranks.mine(batches)
    tick = ticker(progress, "evaluate", sum(len(m.layers) for m in models))
    tokens = sum(map(n_tokens, given.values()))
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in given}
    with tempfile.TemporaryDirectory() as scratch:
        last = []
        for i, m in enumerate(models):
            trail = trail_of(m, tokens, compute, 3 + len(models), Path(scratch))
            folder = Path(scratch, str(i)) if trail.place == "disk" else None
            up = walk(m, [part for _, part in mine], tick, Trail(trail.place, folder))
            last.append(finish(up).last)
        for b, (name, part) in enumerate(mine):
            against = None if original is None else (original, last[1][b])
            sums[name] += batch_sums(streamed, last[0][b], part, against)
        for states in last:
            states.drop()
    return {
        name: loss_of(
            compute.ranks.add_up(sums[name]),
            n_predicted(of),
            against=original is not None,
        )
        for name, of in given.items()
    }


def _speed(
    model: str | Path,
    streamed: Streamed,
    prompt: Int[Tensor, "one S"],
    compute: Compute,
    *,
    skip: bool = False,
) -> tuple[float | None, float | None]:
    """(prompt, decoded) tokens/s of the whole model, where it fits the device; else None."""
    if not fits(streamed) or not compute.ranks.is_first:
        return None, None
    return speed(load(model, compute, skip=skip), prompt)


def _plan_digest(path: Path) -> str | None:
    file = path / "plan.yaml"
    try:
        return Plan.loads(file.read_text()).code_digest if file.is_file() else None
    except UnicodeDecodeError as e:
        raise PlanError(f"{file} is no text ({e}); compress again") from e


def _check_vocabularies(model: Streamed, original: Streamed | None, against: Any) -> None:
    sizes = [m.model.config.get_text_config().vocab_size for m in (model, original or model)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{against} knows {sizes[1]} tokens and the model {sizes[0]}; give its own original"
        )


def _result(
    streamed: Streamed,
    by_file: Mapping[str, Loss],
    window: int,
    names: tuple[str, str | None],
    rates: tuple[float | None, float | None],
    seconds: Mapping[str, float],
) -> Result:
    means = mean_loss(by_file)
    loss = means["loss_nats"]
    assert loss is not None  # every file has a loss
    if loss > MOST_NATS:
        raise DataError(f"a loss of {loss:.3g} nats a token; the checkpoint is damaged")
    return Result(
        model=names[0],
        against=names[1],
        loss_nats=loss,
        perplexity=math.exp(loss),
        kl_nats=means["kl_nats"],
        top1_agreement=means["top1_agreement"],
        original_loss_nats=means["original_loss_nats"],
        by_file=by_file,
        window=window,
        memory_bytes=memory_bytes(streamed),
        experts_run=experts_run(streamed.model),
        prefill_tokens_per_s=rates[0],
        decode_tokens_per_s=rates[1],
        device=device_name(streamed.device),
        dtype=str(streamed.model.dtype).removeprefix("torch."),
        seconds=seconds,
        plan_digest=_plan_digest(streamed.checkpoint.path),
        **weigh(streamed.checkpoint),
    )
