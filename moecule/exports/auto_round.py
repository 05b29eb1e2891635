"""The layout of auto-round: 2, 4 and 8 bits, expert by expert, unpacked by transformers with auto-round.

    X.qweight  int32 [N * bits / 32, M]: code j of a word at its bits j * bits ...
    X.qzeros   int32 [N / group, M * bits / 32], likewise      X.scales  fp16 [N / group, M]
    weight = (code - zero) * scale, zero points being codes

The words are moecule's own, turned. config.json says the width of every matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import Float16, Int
from torch import Tensor

from moecule.errors import PlanError
from moecule.exports.change import Change, Tally
from moecule.exports.contents import EXPERT, Contents
from moecule.exports.stock import Widths, write_rest
from moecule.grid import clip_of, round_to_nearest
from moecule.moe import experts_in
from moecule.packed import BLOCK, Packed, pack, unpack
from moecule.writer import Writer

BITS = (2, 4, 8)


def write(contents: Contents, made: Path, tick: Callable[[], None]) -> tuple[Change, ...]:
    """Write the folder `made`; what became of the weights. `tick` is called for every layer.

    Raises PlanError for what auto-round would not unpack, or not as it is.
    """
    widths = Widths.of(contents)
    _check(widths)
    writer, tally, layers = Writer(made), Tally(), dict[str, dict[str, Any]]()
    for i in range(-1, contents.n_layers):
        tensors: dict[str, Tensor] = {}
        for name, weight in contents.part(i).items():
            module = name.removesuffix(".weight")
            _check_names(contents, name)
            if isinstance(weight.value, Packed):
                _check_shape(module, weight.value)
                tensors |= _coded(f"{module}.", weight.value, tally)
                layers[module] = {"bits": weight.bits, "group_size": weight.value.group}
            else:
                tensors[name] = weight.value
                tally.keep(str(weight.value.dtype).removeprefix("torch."), weight.value)
                if weight.value.dim() == 2 and i >= 0:
                    layers[module] = {"bits": 16}
        writer.add("outer" if i < 0 else f"layer-{i:04d}", tensors)
        tick()
    writer.close()
    write_rest(contents, widths, made, _config(layers))
    return tally.changes()


def _check(widths: Widths) -> None:
    every = [k for of in widths.experts.values() for k in of] + list(widths.modules.values())
    odd = sorted({k.bits for k in every if k.bits not in (*BITS, 16)})
    if odd:
        raise PlanError(
            f"the folder has weights of {', '.join(map(str, odd))} bits, and auto-round unpacks 2, 4 "
            "and 8; compress with --set allocate.bits=[2,4,8], or edit plan.yaml"
        )


def _check_names(contents: Contents, name: str) -> None:
    """auto-round makes modules of a layer's experts, named as the experts module is in memory."""
    found = EXPERT.fullmatch(name)
    inside = {n for n, _ in experts_in(contents.model)}
    if found and (found["stack"] not in inside or not found["matrix"].endswith("_proj")):
        raise PlanError(
            f"{contents.family.model_type} names its experts on disk otherwise ({name}) than auto-round, "
            "which would fill them in at random; load the folder with moecule, or export --to gguf"
        )


def _check_shape(name: str, packed: Packed) -> None:
    rows, columns = packed.codes.shape[0], packed.columns
    if rows % BLOCK or columns % BLOCK or columns % packed.group:
        raise PlanError(
            f"{name} is [{rows}, {columns}] in groups of {packed.group}, and auto-round wants rows in "
            f"{BLOCK}s and columns in {BLOCK}s and whole groups; compress with a smaller group (--set "
            "group=32)"
        )


def _coded(prefix: str, packed: Packed, tally: Tally) -> dict[str, Tensor]:
    """The tensors of a matrix; codes are kept where zero points are codes."""
    codes, scale, zero = _whole(packed)
    words = pack(codes, packed.bits)
    made = {
        "qweight": words.mT.contiguous(),
        "qzeros": pack(zero.mT.contiguous(), packed.bits),
        "scales": scale.mT.contiguous(),
    }
    new = Packed(words, scale, zero.half(), packed.bits, packed.group, packed.columns)
    size = sum(t.nbytes for t in made.values())
    kind = f"int{packed.bits} g{packed.group}"
    tally.add(packed.bits, kind, size, packed.dequantize(), new.dequantize())
    return {prefix + name: t for name, t in made.items()}


def _whole(
    packed: Packed,
) -> tuple[Int[Tensor, "M N"], Float16[Tensor, "M G"], Int[Tensor, "M G"]]:
    """(codes, scales, zero points that are codes): the very ones, or rounded to nearest once more."""
    zero = packed.zero
    assert zero is not None  # one-bit codes are refused
    if not bool(zero.frac().any()) and 0 <= float(zero.min()) <= float(zero.max()) < 2**packed.bits:
        return unpack(packed.codes, packed.bits, packed.columns), packed.scale, zero.int()
    clip = clip_of("wide", "whole")
    codes, scale, whole = round_to_nearest(packed.dequantize(), packed.bits, packed.group, clip)
    return codes, scale.half(), whole.int()


def _config(layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What config.json says of the quantisation: what most matrices have, and which differ."""
    rounded = [(of["bits"], of["group_size"]) for of in layers.values() if of["bits"] < 16]
    ((most, _),) = Counter(rounded).most_common(1)
    common = {"bits": most[0], "group_size": most[1]}
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        **common,
        "sym": False,
        "data_type": "int",
        "extra_config": {name: of for name, of in layers.items() if of != common},
    }
