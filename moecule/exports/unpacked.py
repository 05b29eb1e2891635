"""A stock checkpoint of 16 bits: what the codes stand for, for tools that know no codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moecule.exports.change import Change, Tally
from moecule.exports.contents import Contents
from moecule.exports.stock import Widths, write_rest
from moecule.packed import Packed
from moecule.writer import Writer


def write(contents: Contents, made: Path, tick: Callable[[], None]) -> tuple[Change, ...]:
    """Write the folder `made`; what became of the weights. `tick` is called for every layer.

    Raises PlanError where nothing is in codes, or no stock config says how wide experts are.
    """
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
