"""A stock checkpoint of 16 bits: what the codes stand for, for tools that know no codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moecule.checkpoint import INDEX, Checkpoint
from moecule.exports.change import Change, Tally
from moecule.exports.contents import Contents
from moecule.exports.stock import Widths, write_rest
from moecule.files import write_text
from moecule.folder import copy_into, side_files
from moecule.packed import Packed
from moecule.writer import Writer


def write(contents: Contents, made: Path, tick: Callable[[], None]) -> tuple[Change, ...]:
    """Write the folder `made`; what became of the weights. `tick` is called for every layer.

    What is a stock checkpoint already, since experts only went from it, is copied.

    Raises PlanError for a stock folder that no plan made, or where no stock config says how wide experts
    are, OutputError where a file cannot be written.
    """
    if contents.stock is not None and _is_ours(contents.checkpoint):
        return _copied(contents, made, tick)
    widths, config = Widths.of(contents, routers=True), contents.checkpoint.config
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = {"float16": torch.float16, "float32": torch.float32}.get(stored, torch.bfloat16)
    writer, tally = Writer(made), Tally()
    for i in range(-1, contents.n_layers):
        tensors: dict[str, Tensor] = {}
        for name, weight in contents.part(i).items():
            if isinstance(weight.value, Packed):
                tensors[name] = weight.dense().to(dtype)
                made_of = str(dtype).removeprefix("torch."), tensors[name].nbytes
                tally.add(weight.bits, *made_of, weight.dense(), tensors[name].float())
            else:
                tensors[name] = weight.value
                tally.keep(str(weight.value.dtype).removeprefix("torch."), weight.value)
        writer.add("outer" if i < 0 else f"layer-{i:04d}", tensors)
        tick()
    writer.close()
    write_rest(contents, widths, made, None)
    return tally.changes()


def _is_ours(source: Checkpoint) -> bool:
    """Whether a plan is beside it, and all is as apply writes it."""
    plain = not any(info.coded for info in source.tensors.values())
    return plain and (source.path / "plan.yaml").is_file()


def _copied(contents: Contents, made: Path, tick: Callable[[], None]) -> tuple[Change, ...]:
    """File by file; config.json without what moecule notes in it."""
    source, tally = contents.checkpoint, Tally()
    for info in source.stored.values():
        tally.keep_bytes(str(info.dtype).removeprefix("torch."), info.size_bytes)
    weights = {source.path / info.file for info in source.stored.values()}
    index = [source.path / INDEX] if (source.path / INDEX).is_file() else []
    others = [f for f in side_files(source.path) if f.name != "export.json"]
    copy_into(made, [*sorted(weights), *index, *others])
    config = {key: value for key, value in source.config.items() if key != "moecule"}
    write_text(made / "config.json", json.dumps(config, indent=2) + "\n")
    for _ in range(contents.n_layers + 1):
        tick()
    return tally.changes()
