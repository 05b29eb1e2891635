"""evaluate: what a compressed model lost, what it weighs and how fast it is, as a Result.

Over several files the loss is the mean of the files' losses, so that a long file does not drown
a short one. `measure.py` has the conventions.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecule.batch import Batch, digest, n_predicted, n_tokens, rows_of, shape_of
from moecule.data import Sampling
from moecule.depth import Sampled, by_depth, sample_of
from moecule.errors import CheckpointError, DataError, PlanError
from moecule.evidence import command_line, versions
from moecule.hf import Streamed
from moecule.inventory import step_bytes, weigh
from moecule.journal import Journal, Trail, journal_of
from moecule.measure import (
    Loss,
    batch_sums,
    device_name,
    loss_of,
    original_loss_of,
    read_rate,
)
from moecule.online import experts_run, has_skip
from moecule.plan import Plan
from moecule.ranks import Ranks
from moecule.result import Result, mean_loss
from moecule.session import (
    Compute,
    Progress,
    memory_bytes,
    noting,
    silent,
    stream_any,
    ticker,
    trail_of,
)
from moecule.suite import Suite
from moecule.text import evaluation_batches
from moecule.walk import finish, walk
from moecule.whole import Whole, measure_whole, of_tasks, prepared, room_of, wanted

MOST_NATS = 700.0  # exp() of more is no float, and no model that computes is so bad
# in the journal: a batch, and `batch_sums` of each process, padded; the walks of the model and the original
SUMS, WALKS = "sums", ("", "original_")


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: Sequence[str | Path] = (),
    length: int = 0,
    data: str | Path | None = None,
    sampling: Sampling | None = None,
    skip: bool = False,
    suite: Suite | None = None,
    memory: str | int | None = None,
    context: int = 0,
    compute: Compute | None = None,
    progress: Progress = silent,
    beside: Path | None = None,
) -> tuple[Result | None, Result]:
    """(the original's result if `against` names it, the model's), over the same windows.

    `text`: files to evaluate on, each whole. Without any: windows of the calibration text `data`
    that calibration did not see, or without that the package's own evaluation text.
    `suite`: tasks to ask, both models alike. `memory` ("24GB", or "original": what the original takes
    with one sequence): decode as many sequences of `context` tokens at once as it holds.
    `beside`: what is done is noted beside this name, and a killed run goes on from there; who has
    taken the result sweeps it. Not with `skip`: which pairs ran is not noted.
    Raises DataError for text that is too short, CheckpointError for an original of another
    vocabulary, and what opening the models raises.
    """
    assert beside is None or not skip
    compute = compute or Compute()
    streamed = stream_any(model, compute, skip=skip)
    original = None if against is None else stream_any(against, compute)
    _check_vocabularies(streamed, original, against)
    path, config = streamed.checkpoint.path, streamed.model.config
    given = evaluation_batches(config, path, text, length, data, sampling or Sampling())
    room = None if memory is None else room_of(memory, context, original, streamed)
    more = wanted(given, room, prepared(_one_by_one(suite, skip), (streamed, original)))
    start = time.perf_counter()
    with _noting(beside, streamed, original, given, compute) as journal:
        by_file, theirs = _losses(streamed, original, given, compute, progress, journal)
    seconds = {"evaluate": round(time.perf_counter() - start, 2)}
    timed = ticker(progress, "speed", 1 if against is None else 2)

    def measured(
        of: Streamed, name: Any, losses: Mapping[str, Loss], what: str, **how: bool
    ) -> Any:
        whole = measure_whole(name, of, more, compute, progress, what, **how)
        timed()
        return whole, _result(of, losses, given, name, against if of is streamed else None, whole)

    first: Whole | None = None
    if original is not None:
        first, before = measured(original, against, theirs, "tasks of the original")
    whole, after = measured(streamed, model, by_file, "tasks", skip=skip)
    after = replace(after, seconds=seconds, **of_tasks(first, whole, more.tasks))
    if first is None or original is None:
        return None, after
    before = replace(before, **of_tasks(None, first, more.tasks))
    sampled = _sampled(model, streamed, original, given, compute, progress, skip=skip)
    return before, replace(after, sampled=sampled, original=before)


def _noting(
    beside: Path | None,
    streamed: Streamed,
    original: Streamed | None,
    given: Mapping[str, list[Batch]],
    compute: Compute,
) -> AbstractContextManager[Journal | None]:
    """The journal beside that name, if there is one."""
    if beside is None:
        return nullcontext()
    return journal_of(beside, _request(streamed, original, given, compute), compute.ranks)


def _one_by_one(suite: Suite | None, skip: bool) -> Suite | None:
    """Skipping reads what each token received, and what pads a batch would be heard."""
    return replace(suite, batch=1) if suite is not None and skip else suite


def _request(
    streamed: Streamed,
    original: Streamed | None,
    given: Mapping[str, list[Batch]],
    compute: Compute,
) -> dict[str, Any]:
    """What the losses depend on."""
    models = [m for m in (streamed, original) if m is not None]
    return {
        "verb": "evaluate",
        "sums": "of windows",
        "processes": compute.ranks.size,
        "digests": [m.checkpoint.digest for m in models],
        "plan": _plan_digest(streamed.checkpoint.path),
        "dtypes": [str(m.model.dtype).removeprefix("torch.") for m in models],
        "device": streamed.device.type,
        "tokens": [[name, digest(of)] for name, of in given.items()],
    }


def _losses(
    streamed: Streamed,
    original: Streamed | None,
    given: Mapping[str, list[Batch]],
    compute: Compute,
    progress: Progress,
    journal: Journal | None,
) -> tuple[dict[str, Loss], dict[str, Loss]]:
    """By file, and the original's. One decoder layer is in memory at a time, of one model after the other.

    What the journal has, layers of either model and sums of batches, is not done again.
    """
    models = [m for m in (streamed, original) if m is not None]
    batches = [(name, batch) for name, of in given.items() for batch in of]
    ranks, mine = compute.ranks, compute.ranks.mine(batches)
    tokens = sum(map(n_tokens, given.values()))
    tick = ticker(progress, "evaluate", sum(len(m.layers) for m in models), tokens)
    most = max(len(rows_of(batch)) for _, batch in batches)
    known = {} if journal is None else journal.done(SUMS)
    left = [b for b in range(-(-len(batches) // ranks.size)) if b not in known]
    with tempfile.TemporaryDirectory() as scratch:
        last = []
        for i, m in enumerate(models if left else ()):
            room = Path(scratch) if journal is None else journal.folder
            trail = trail_of(m, tokens, compute, 3 + len(models), room)
            if journal is not None:
                trail = noting(trail, journal, WALKS[i])
            else:
                trail = Trail(trail.place, room / str(i) if trail.place == "disk" else None)
            up = walk(m, [part for _, part in mine], tick, trail)
            last.append(finish(up).last)
        for b in left:
            of_all = torch.zeros(ranks.size, most, 4, dtype=torch.float64)
            if b < len(mine):  # others may have one more
                against = None if original is None else (original, last[1][b])
                sums = batch_sums(streamed, last[0][b], mine[b][1], against)
                of_all[ranks.rank, : len(sums)] = sums
            known[b] = {SUMS: b, "of": ranks.add_up(of_all).tolist()}
            if journal is not None:
                journal.add(known[b])
        for states in last:
            states.drop()
    of_each = _by_window(known, batches, ranks)
    ours = {name: loss_of(*of, against=original is not None) for name, of in of_each.items()}
    if original is None:
        return ours, {}
    return ours, {name: original_loss_of(*of) for name, of in of_each.items()}


def _by_window(
    known: Mapping[int, Any], batches: Sequence[tuple[str, Batch]], ranks: Ranks
) -> dict[str, tuple[Tensor, Tensor]]:
    """{file: (`batch_sums` of its windows in order, tokens of each that have a loss)}."""
    sums: dict[str, list[Any]] = {name: [] for name, _ in batches}
    tokens: dict[str, list[int]] = {name: [] for name, _ in batches}
    for rank in range(ranks.size):
        for b, (name, batch) in enumerate(Ranks(rank, ranks.size).mine(batches)):
            rows = rows_of(batch)
            sums[name] += known[b]["of"][rank][: len(rows)]
            tokens[name] += [n_predicted([row]) for row in rows]
    return {
        name: (torch.tensor(of, dtype=torch.float64), torch.tensor(tokens[name]))
        for name, of in sums.items()
    }


def _sampled(
    model: str | Path,
    streamed: Streamed,
    original: Streamed,
    given: Mapping[str, list[Batch]],
    compute: Compute,
    progress: Progress,
    *,
    skip: bool,
) -> Sampled | None:
    """By layer; of the first process alone. Layers are read once more for it, and none is kept."""
    if not compute.ranks.is_first:
        return None
    skipping = None
    if has_skip(streamed.model):
        skipping = stream_any(model, compute, skip=True)
    plain = stream_any(model, compute) if skip else streamed
    models = 2 + (skipping is not None)
    tick = ticker(progress, "by layer", models * len(streamed.layers))
    return by_depth(plain, original, sample_of(given, len(streamed.layers)), tick, skipping)


def _plan_digest(path: Path) -> str | None:
    file = path / "plan.yaml"
    try:
        return Plan.loads(file.read_text(encoding="utf-8")).code_digest if file.is_file() else None
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
    given: Mapping[str, list[Batch]],
    model: str | Path,
    against: str | Path | None,
    whole: Whole,
) -> Result:
    means = mean_loss(by_file)
    loss = means["loss_nats"]
    assert loss is not None  # every file has a loss
    if loss > MOST_NATS:
        raise DataError(
            f"a loss of {loss:.3g} nats a token; the checkpoint is damaged, fetch it or make it again"
        )
    return Result(
        model=str(model),
        against=None if against is None else str(against),
        loss_nats=loss,
        perplexity=math.exp(loss),
        kl_nats=means["kl_nats"],
        top1_agreement=means["top1_agreement"],
        original_loss_nats=means["original_loss_nats"],
        by_file=by_file,
        window=max(shape_of(of)[1] for of in given.values()),
        text_digests={name: digest(of) for name, of in given.items()},
        memory_bytes=memory_bytes(streamed),
        experts_run=experts_run(streamed.model),
        prefill_tokens_per_s=whole.prefill_tokens_per_s,
        decode_tokens_per_s=whole.decode_tokens_per_s,
        throughput=whole.throughput,
        device=device_name(streamed.device),
        dtype=str(streamed.model.dtype).removeprefix("torch."),
        plan_digest=_plan_digest(streamed.checkpoint.path),
        digest=streamed.checkpoint.digest,
        step_bytes=step_bytes(streamed),
        read_bytes_per_s=read_rate(streamed.device),
        command=command_line(),
        versions=versions(),
        **weigh(streamed.checkpoint),
    )
