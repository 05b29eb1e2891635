"""What is measured of models that are loaded whole: speed, throughput in a given memory, and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
            raise CheckpointError(
                f"{m.checkpoint.name} does not fit {m.device} whole, and tasks need that; leave "
                "them out, or take another device"
            )
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
    if not fits(streamed) or not compute.ranks.is_first:
        return Whole()
    loaded = load(model, compute, skip=skip, exact=False)
    rates, throughput, scores = speed(loaded, wanted.prompt), None, None
    if wanted.room is not None:
        throughput = _throughput(loaded, streamed.checkpoint.size_bytes, wanted.room, wanted.tokens)
    if wanted.tasks is not None:
        from moecule.harness import score

        set_exact(loaded, True)
        tokenizer = tokenizer_of(streamed.checkpoint.path)
        scores = score(loaded, tokenizer, wanted.tasks, progress, what)
    return Whole(*rates, throughput, scores)


def _throughput(
    loaded: Any, weight_bytes: int, room: Room, tokens: Int[Tensor, " T"]
) -> Throughput:
    n, length = room.sequences(weight_bytes), room.context_tokens
    rate, peak, device = None, None, loaded.device
    if n:
        tokens = tokens.repeat(-(-length // len(tokens)))
        starts = torch.linspace(
            0, len(tokens) - length, n
        ).long()  # no two alike: nor their experts
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rate = decode_rate(loaded, torch.stack([tokens[s : s + length] for s in starts]))
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
    return Throughput(room.memory_bytes, length, weight_bytes, room.sequence_bytes, n, rate, peak)


def of_tasks(before: Whole | None, after: Whole, tasks: Any) -> dict[str, Any]:
    """The parts of the model's Result that tell of tasks, and of the original's throughput."""
    found: dict[str, Any] = {}
    if before is not None:
        found["original_throughput"] = before.throughput
    if tasks is None or after.scores is None:
        return found
    found |= {"tasks": after.scores.tasks, "suite": tasks.as_dict() | {"cut": after.scores.cut}}
    if before is not None and before.scores is not None:
        from moecule.harness import changes

        found["original_tasks"] = before.scores.tasks
        found["task_changes"] = changes(before.scores, after.scores)
    return found
