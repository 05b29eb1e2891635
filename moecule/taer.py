"""PreMoe's retrieval: patterns of domains into one file; a model with a prompt's experts alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moecule.batch import Batch, n_tokens, tokens_of
from moecule.calibrate import collect
from moecule.data import room_for
from moecule.drop import first_of
from moecule.errors import DataError, OutputError, RecipeError
from moecule.files import writing
from moecule.hf import Streamed
from moecule.method import load_method
from moecule.moe import experts_of, put_experts, router_logits, select_experts
from moecule.pattern import SEEN, By, Patterns, Room, distances, task_of
from moecule.recipe import Recipe, load_recipe, recipe_names
from moecule.record import record
from moecule.session import Compute, Progress, memory_bytes, silent, stream, ticker, with_settings
from moecule.text import calibration_batches

AUTO = Compute()


def patterns(
    model: str | Path,
    out: str | Path,
    domains: Mapping[str, str | Path],
    *,
    recipe: str | Recipe = "premoe",
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> Patterns:
    """Of each domain, {name: file of its text}, the order in which the recipe's scores keep experts.

    Written to the file `out`. Windows are as the recipe samples them; prompts of their length are told
    best. Raises RecipeError for a recipe that scores no experts, DataError for text of less than two
    windows, OutputError where `out` is there.
    """
    chosen_recipe, out = recipe if isinstance(recipe, Recipe) else load_recipe(recipe), Path(out)
    part = chosen_recipe.score
    if part is None:
        able = [n for n in recipe_names() if load_recipe(n).score is not None]
        raise RecipeError(
            f"recipe {chosen_recipe.name} does not score experts; those that do are {', '.join(able)}"
        )
    if not domains or not all(domains):
        raise RecipeError("no domain was named; give NAME=FILE of its text, once for each")
    score = load_method(part.method, "score")
    assert score.score is not None  # load_method saw to it
    ranks = compute.ranks
    if ranks.is_first and out.exists():
        raise OutputError(f"{out} is there; name another file or remove it")
    streamed = stream(model, compute)
    sampling = replace(chosen_recipe.data, batch=1)  # what SEEN sums is of a window
    texts = {n: calibration_batches(streamed, f, sampling) for n, f in domains.items()}
    for name, batches in texts.items():
        if len(batches) < max(2, ranks.size):
            raise DataError(
                f"{domains[name]} gives {len(batches)} windows, and {name} wants {max(2, ranks.size)} or "
                "more, to know how they differ: give more text, or shorter windows (--length)"
            )
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    tokens = sum(map(n_tokens, texts.values()))
    tick, tasks = ticker(progress, "patterns", len(texts) * len(streamed.layers), tokens), []
    for name, batches in texts.items():
        needs = tuple(dict.fromkeys((*score.needs(part.options), *SEEN)))
        sums = dict(collect(streamed, ranks.mine(batches), needs, tick))
        scores = [s for _, s in sorted(score.score(sums, part.options).items())]
        tasks.append(task_of(name, len(batches), sums[min(sums)], scores))
    how = {"samples": sampling.samples, "length": sampling.length, "seed": sampling.seed}
    said = {"recipe": chosen_recipe.name, "score": part.as_dict(), "data": how}
    made = Patterns(str(model), streamed.checkpoint.digest, tuple(tasks), said)
    if ranks.is_first:
        made.save(out)
    ranks.wait()
    return made


@dataclass(frozen=True)
class Wanted:
    """Which experts to load for a prompt: those of the nearest task, so many a layer."""

    patterns: Patterns
    experts: int
    by: By = "spread"


@dataclass(frozen=True)
class Retrieved:
    """What was loaded."""

    task: str
    distances: Mapping[str, float]  # of all tasks, the nearest first
    experts: int  # a layer
    of: int
    memory_bytes: int  # of parameters and buffers
    whole_bytes: int  # with all experts


def retrieve(
    model: str | Path, batch: Batch, wanted: Wanted, compute: Compute
) -> tuple[Any, Retrieved]:
    """(the model with the experts of the prompt's task alone, ready to run; what was retrieved).

    No more is in memory at any time than that and one layer's other experts. Raises DataError for
    patterns of another model and a prompt that is too long, RecipeError for a number of experts that
    cannot be.
    """
    streamed = stream(model, compute, empty=True)
    _check(streamed, wanted)
    room_for(tokens_of(batch), streamed.model.config)
    whole = memory_bytes(streamed)
    streamed.load_outer()
    far = distances(wanted.patterns, first_logits(streamed, batch), wanted.by)
    task = next(t for t in wanted.patterns.tasks if t.name == next(iter(far)))
    at = 0
    for i in range(len(streamed.layers)):
        streamed.load_layer(i)
        moe, room = streamed.moe(i), room_of(streamed, i)
        if moe is not None and room is not None:
            kept = first_of(task.ranks[at].tolist(), wanted.experts, room.groups)
            put_experts(moe.experts, experts_of(moe.experts).select(kept))
            select_experts(moe, kept, room.n)
            at += 1
    held = memory_bytes(streamed)
    n = task.ranks.shape[1]
    return with_settings(streamed), Retrieved(task.name, far, wanted.experts, n, held, whole)


def room_of(streamed: Streamed, i: int) -> Room | None:
    """Of layer i, or None where it is dense."""
    moe, config = streamed.moe(i), streamed.model.config.get_text_config()
    if moe is None:
        return None
    groups, top_groups = streamed.family.n_groups(config), streamed.family.top_groups(config)
    return Room(moe.experts.num_experts, moe.top_k, groups, top_groups)


def _check(streamed: Streamed, wanted: Wanted) -> None:
    """Raise what can be known to be wrong before anything is loaded."""
    found, checkpoint = wanted.patterns, streamed.checkpoint
    if found.digest != checkpoint.digest:
        raise DataError(
            f"the patterns are of {found.model} ({found.digest}), and {checkpoint.name} is "
            f"{checkpoint.digest}; make them of this model (moecule patterns)"
        )
    rooms = [room for i in range(len(streamed.layers)) if (room := room_of(streamed, i))]
    for room in rooms:
        room.check(wanted.experts)
    want = (len(rooms), rooms[0].n)
    if any(tuple(t.ranks.shape) != want for t in found.tasks):
        raise DataError(
            f"the patterns are not of {want[0]} layers of {want[1]} experts, as {checkpoint.name} has; "
            "make them anew (moecule patterns)"
        )


@torch.no_grad()
def first_logits(streamed: Streamed, batch: Batch) -> Float[Tensor, "T E"]:
    """What the first router makes of a batch. No expert is loaded, let alone run."""
    first = next(i for i in range(len(streamed.layers)) if streamed.moe(i) is not None)
    hidden, calls = record(streamed.model, batch, None, streamed.family.takes)
    handed = None
    for i in range(first):
        layer = streamed.load_layer(i)
        hidden, handed = calls[i](layer, hidden, handed)
        layer.to("meta")
    moe, layer = streamed.moe(first), streamed.load_unrouted(first)
    assert moe is not None
    logits = router_logits(moe, lambda: calls[first](layer, hidden, handed))
    layer.to("meta")
    return logits[:, : moe.experts.num_experts]
