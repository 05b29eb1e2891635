"""What is measured of models that are loaded whole: speed, throughput in a given memory, and tasks."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moecule.batch import Batch, rows_of, text_tokens
from moecule.budget import Cache, cache_bytes, format_size, parse_size
from moecule.cache import caches_of
from moecule.data import window_length
from moecule.errors import CheckpointError, RecipeError
from moecule.hf import Streamed
from moecule.measure import SPEED_TOKENS, Throughput, decode_rate, speed
from moecule.runtime import set_exact
from moecule.session import Compute, Progress, fits, load, tokenizer_of
from moecule.suite import Suite

ORIGINAL = "original"  # as a memory: what the original takes with one sequence


@dataclass(frozen=True)
class Room:
    """The memory that sequences are to fill beside a model, and what one of them takes."""

    memory_bytes: int
    context_tokens: int
    caches: tuple[Cache, ...]

    @property
    def sequence_bytes(self) -> int:
        """Of one sequence's KV cache."""
        return cache_bytes(self.caches, self.context_tokens)

    def sequences(self, weight_bytes: int) -> int:
        """How many fit beside so many bytes of weights."""
        return max(0, (self.memory_bytes - weight_bytes) // self.sequence_bytes)


@dataclass(frozen=True)
class Wanted:
    """What is to be measured besides speed."""

    prompt: Int[Tensor, "one S"]
    tokens: Int[Tensor, " T"]  # of all the text, for sequences to hold
    room: Room | None = None
    tasks: Any = None  # `exam.Prepared`


@dataclass(frozen=True)
class Whole:
    """What was measured; None where it was not asked for or the model does not fit its device."""

    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    throughput: Throughput | None = None
    scores: Any = None  # `harness.Scores`


def room_of(memory: str | int, context: int, original: Streamed | None, streamed: Streamed) -> Room:
    """Raises RecipeError for a memory that cannot be read or holds no sequence beside the model."""
    by = original or streamed  # both keep the same of past tokens
    length = window_length(by.model.config, context)
    if length < SPEED_TOKENS + 2:
        raise RecipeError(
            f"contexts of {length} tokens are too short to time; give {SPEED_TOKENS + 2} or more"
        )
    caches = caches_of(by.model)
    if memory == ORIGINAL:
        if original is None:
            raise RecipeError("--memory original needs the original; give --against, or a size")
        size = original.checkpoint.size_bytes + cache_bytes(caches, length)
    else:
        size = parse_size(memory)
    room = Room(size, length, caches)
    if not room.sequences(streamed.checkpoint.size_bytes):
        least = streamed.checkpoint.size_bytes + room.sequence_bytes
        raise RecipeError(
            f"{format_size(size)} holds not one sequence of {length} tokens beside the model; "
            f"{format_size(least)} would hold one"
        )
    return room


def prepared(suite: Suite | None, models: tuple[Streamed | None, ...]) -> Any:
    """`exam.prepare`, where tasks are asked.

    Raises RecipeError where the harness is not there, CheckpointError for a model without room.
    """
    if suite is None:
        return None
    try:
        from moecule.exam import prepare
    except ImportError as e:
        raise RecipeError(
            f"tasks are asked by lm-evaluation-harness ({e}); pip install 'moecule[eval]'"
        ) from e
    for m in models:
        if m is not None and not fits(m):
            raise _no_room(m)
    return prepare(suite)


def wanted(given: Mapping[str, list[Batch]], room: Room | None, tasks: Any) -> Wanted:
    """With the text that the losses are measured on."""
    rows = [text_tokens(row) for of in given.values() for batch in of for row in rows_of(batch)]
    return Wanted(rows[0], torch.cat([row[0] for row in rows]), room, tasks)


def measure_whole(
    model: str | Path,
    streamed: Streamed,
    wanted: Wanted,
    compute: Compute,
    progress: Progress,
    what: str,
    *,
    skip: bool = False,
) -> Whole:
    """Of one model, as generate runs it; tasks as it is rounded, without rounding activations.

    `what`: whose tasks the progress is of.
    """
    if not compute.ranks.is_first:
        return Whole()
    size, room = streamed.checkpoint.size_bytes, wanted.room
    if not fits(streamed):
        if wanted.tasks is not None:
            raise _no_room(streamed)
        return Whole(throughput=None if room is None else _throughput(room, size))
    loaded = load(model, compute, skip=skip, exact=False)
    rates, throughput, scores = speed(loaded, wanted.prompt), None, None
    if room is not None:
        throughput = _decoded(loaded, _throughput(room, size), wanted.tokens)
    if wanted.tasks is not None:
        from moecule.harness import score

        set_exact(loaded, True)
        tokenizer = tokenizer_of(streamed.checkpoint.path)
        scores = score(loaded, tokenizer, wanted.tasks, progress, what)
    if loaded.device.type == "cuda":  # the next model needs the room, which torch holds back
        del loaded
        gc.collect()
        torch.cuda.empty_cache()
    return Whole(*rates, throughput, scores)


def _no_room(streamed: Streamed) -> CheckpointError:
    return CheckpointError(
        f"{streamed.checkpoint.name} does not fit {streamed.device} whole, and tasks need that; leave "
        "them out, or take another device"
    )


def _throughput(room: Room, weight_bytes: int) -> Throughput:
    """What fits; nothing is timed yet."""
    one, n = room.sequence_bytes, room.sequences(weight_bytes)
    return Throughput(room.memory_bytes, room.context_tokens, weight_bytes, one, n, None, None)


def _decoded(loaded: Any, of: Throughput, tokens: Int[Tensor, " T"]) -> Throughput:
    """With the rate of sequences from all over the text, so that their experts differ."""
    length, device, peak = of.context_tokens, loaded.device, None
    if not of.sequences:
        return of
    tokens = tokens.repeat(-(-length // len(tokens)))
    starts = torch.linspace(0, len(tokens) - length, of.sequences).long()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rate = decode_rate(loaded, torch.stack([tokens[s : s + length] for s in starts]))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return replace(of, decode_tokens_per_s=rate, peak_memory_bytes=peak)


def of_tasks(before: Whole | None, after: Whole, tasks: Any) -> dict[str, Any]:
    """The parts of the Result that tell of tasks; `before`: of the original, where both were asked."""
    if tasks is None or after.scores is None:
        return {}
    found = {"tasks": after.scores.tasks, "suite": tasks.as_dict() | {"cut": after.scores.cut}}
    if before is not None and before.scores is not None:
        from moecule.harness import changes

        found["task_changes"] = changes(before.scores, after.scores)
    return found
