"""Names of tensors on disk and in memory, by transformers' own conversion mapping."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError


def names_in_memory(model: Any, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """{name in memory: the names on disk it is made of}; warns of what the model has no place for.

    Raises CheckpointError where a tensor's place is of another size.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    places = model.state_dict()
    out: dict[str, list[str]] = {}
    left: list[str] = []
    for name in checkpoint.tensors:
        new, source = rename_source_key(
            name, renamings, converters, model.base_model_prefix, places
        )
        made = [n for n in _all_made(new, source, converters) if n in places]
        for n in made:
            out.setdefault(n, []).append(name)
        if not made and not _is_buffer(model, new):
            left.append(name)
    _check_sizes(out, places, checkpoint)
    _warn_of(left, model, checkpoint)
    return out


def _check_sizes(
    disk: Mapping[str, list[str]], places: Mapping[str, Tensor], checkpoint: Checkpoint
) -> None:
    several = Counter(d for of in disk.values() for d in of)
    for name, of in disk.items():
        held, wanted = sum(checkpoint.tensors[d].numel for d in of), places[name].numel()
        if held != wanted and all(several[d] == 1 for d in of):
            raise CheckpointError(
                f"{checkpoint.path} does not fit its config.json: {name} has {wanted} numbers there and "
                f"{held} in the files; fetch it again"
            )


def _all_made(name: str, source: str | None, converters: list[Any]) -> list[str]:
    """All that a converter makes; `name` is made by its first target pattern."""
    for converter in converters:
        if source is not None and source in converter.source_patterns:
            first, *others = converter.target_patterns
            return [name, *(name.replace(first, other) for other in others)]
    return [name]


def _is_buffer(model: Any, name: str) -> bool:
    """Whether the model computes the tensor itself, such as rotary frequencies."""
    module, _, leaf = name.rpartition(".")
    at = dict(model.named_modules()).get(module) if leaf == "inv_freq" else None
    return at is not None and leaf in at._non_persistent_buffers_set


def _warn_of(left: list[str], model: Any, checkpoint: Checkpoint) -> None:
    known = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    ignored = [n for n in left if any(p.search(n) for p in known)]
    others = [n for n in left if n not in set(ignored)]
    for names, why in (
        (ignored, "transformers passes over, such as layers that predict further tokens"),
        (others, "the model of its config.json has no place for"),
    ):
        if names:
            warnings.warn(
                f"{checkpoint.path} holds {len(names)} tensors (such as {names[0]}) that {why}; they are "
                "left out of what is written",
                stacklevel=2,
            )


def sizes_in_memory(
    disk: Mapping[str, list[str]], sizes: Mapping[str, int], places: Mapping[str, Tensor]
) -> dict[str, int]:
    """{name in memory: bytes}, of {name on disk: bytes}; what several share is split as weights are."""
    shares: dict[str, int] = {}  # weights that a tensor on disk goes into
    for name, of in disk.items():
        for d in of:
            shares[d] = shares.get(d, 0) + places[name].numel()
    return {
        name: sum(sizes[d] * places[name].numel() // shares[d] for d in of)
        for name, of in disk.items()
    }
