"""A checkpoint with narrower experts and fewer groups of attention heads: weights sliced, none computed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from moecule.checkpoint import Checkpoint
from moecule.errors import RecipeError
from moecule.family import text_part
from moecule.files import write_text
from moecule.folder import copy_into, side_files
from moecule.heads import Heads, attention_in, cut_heads, group_keys, heads_of
from moecule.hf import Streamed
from moecule.moe import experts_in, experts_of, find_layers, put_experts
from moecule.narrow import ALIGNED
from moecule.width import of_one_width, width_key
from moecule.writer import Writer

NO_NOTE: Mapping[str, Any] = {}
Kept = Mapping[int, Int[Tensor, "..."]]  # by layer


def width_of(model: Any) -> int:
    """Channels of every expert. Raises RecipeError where experts have several widths."""
    wide = {experts_of(m).down.shape[2] for _, m in experts_in(model)}
    if len(wide) > 1:
        raise RecipeError(f"this model's experts have widths {sorted(wide)}, wanted one for all")
    return wide.pop()


def slim_keys(model: Any, width: int, groups: int | None) -> dict[str, int]:
    """{key of the config's text part: value} with experts so wide, and so many groups of heads.

    None: all of them. Raises RecipeError where the config cannot say it and nothing else.
    """
    full, family = width_of(model), model.config.model_type
    if not ALIGNED <= width <= full or width % ALIGNED:
        raise RecipeError(
            f"width = {width}, and this model's experts have {full} channels; wanted a multiple of "
            f"{ALIGNED} from {ALIGNED} to {full}"
        )
    keys = {} if groups is None else group_keys(model, groups)
    if width == full:
        return keys
    key = width_key(model, width)
    if key is None:
        raise RecipeError(
            f"width = {width}: no key of {family}'s config says how wide its experts are and nothing else, "
            "so no stock checkpoint can hold them; compress with --recipe heapr: what it makes loads with "
            "moecule"
        )
    return {key: width, **keys}


def cut(
    streamed: Streamed, channels: Kept, groups: Kept, out: Path, note: Mapping[str, Any] = NO_NOTE
) -> None:
    """Write the checkpoint into the folder `out` with these channels and groups of heads alone.

    `streamed` is used up. Tensors keep their dtype on disk; those that nothing is cut from are the same
    bytes. `note` is what config.json says of how it was made. Raises OutputError where there is no room,
    RecipeError where the config cannot say it.
    """
    model = streamed.model
    counts = {of.shape[-1] for of in groups.values()}
    (width,) = {of.shape[-1] for of in channels.values()}
    keys = slim_keys(model, width, counts.pop() if counts else None)
    heads = heads_of(model) if groups else None
    writer = Writer(out)
    names = set(streamed.outer_names())
    outer = {n: t for n, t in model.state_dict().items() if n in names}
    writer.add("outer", streamed.to_disk(outer))
    _, layers = find_layers(model)
    for i in range(len(layers)):
        layer = streamed.load_layer(i, i + 1 if i + 1 < len(layers) else None)
        _cut_layer(layer, channels.get(i), groups.get(i), heads)
        state = {f"{streamed.prefix}{i}.{n}": t for n, t in layer.state_dict().items()}
        writer.add(f"layer-{i:04d}", streamed.to_disk(state))
        layer.to("meta")
    writer.close()
    _write_config(streamed.checkpoint, keys, out, note)


def _cut_layer(
    layer: Any,
    channels: Int[Tensor, "E C"] | None,
    groups: Int[Tensor, " g"] | None,
    heads: Heads | None,
) -> None:
    """In place."""
    for _, module in experts_in(layer):
        assert channels is not None  # every MoE layer was scored
        if channels.shape[1] < experts_of(module).down.shape[2]:
            put_experts(module, of_one_width(module, channels))
    attention = attention_in(layer)
    if attention is not None and groups is not None and heads is not None:
        cut_heads(attention[1], groups, heads)


def _write_config(
    source: Checkpoint, keys: Mapping[str, int], out: Path, note: Mapping[str, Any]
) -> None:
    config: dict[str, Any] = copy.deepcopy(dict(source.config))
    for key in ("auto_map", "moecule"):  # code that is not copied, and how the source was made
        config.pop(key, None)
    if note:
        config["moecule"] = dict(note)
    text_part(config).update(keys)
    copy_into(out, side_files(source.path))
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
