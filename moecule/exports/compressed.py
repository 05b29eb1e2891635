"""compressed-tensors, format pack-quantized: what vLLM's fused MoE runs, and transformers unpacks.

All experts of all layers have one width and group, zero points in the middle. Of anything else
transformers reads one width for all without a word, and vLLM refuses it, so it is refused here.

    X.weight_packed  int32 [M, N * bits / 32]: code j of a word at its bits j * bits ...
    X.weight_scale   fp16 [M, N / group]          X.weight_shape  int64 [2]
    weight = (code - 2**(bits - 1)) * scale

For widths of 4 and 8 the words are moecule's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float16, Int
from torch import Tensor

from moecule.errors import PlanError
from moecule.exports.change import Change, Tally
from moecule.exports.contents import Contents
from moecule.exports.stock import Widths, write_rest
from moecule.grid import clip_of, round_to_nearest
from moecule.packed import Packed, pack, unpack
from moecule.plan import Keep
from moecule.writer import Writer

BITS, GROUPS = (4, 8), (32, 64, 128)  # of vLLM's kernels
FORMAT = "pack-quantized"
EXPERTS = r"re:.*\.experts\.\d+\..*"


def write(contents: Contents, made: Path, tick: Callable[[], None]) -> tuple[Change, ...]:
    """Write the folder `made`; what became of the weights. `tick` is called for every layer.

    Raises PlanError for what vLLM or transformers would not run, or would run as something else.
    """
    widths = Widths.of(contents)
    experts, dense = _one_width(widths)
    writer, tally, ignored = Writer(made), Tally(), list[str]()
    for i in range(-1, contents.n_layers):
        tensors: dict[str, Tensor] = {}
        for name, weight in contents.part(i).items():
            if isinstance(weight.value, Packed):
                _check_columns(name, weight.value)
                tensors |= _coded(name.removesuffix("weight"), weight.value, tally)
            else:
                tensors[name] = weight.value
                tally.keep(str(weight.value.dtype).removeprefix("torch."), weight.value)
                if weight.value.dim() == 2 and "embed" not in name:
                    ignored.append(name.removesuffix(".weight"))
        writer.add("outer" if i < 0 else f"layer-{i:04d}", tensors)
        tick()
    writer.close()
    if "lm_head" not in ignored:
        ignored.append("lm_head")  # where it is the embedding
    groups = {"experts": (experts, [EXPERTS])} | ({"dense": (dense, ["Linear"])} if dense else {})
    config = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {name: _group(*of) for name, of in groups.items()},
        "ignore": ignored,
    }
    write_rest(contents, widths, made, config)
    return tally.changes()


def _one_width(widths: Widths) -> tuple[Keep, Keep | None]:
    """The width of all experts, and of all else that is rounded."""
    experts = {Keep(k.bits, k.group) for of in widths.experts.values() for k in of}
    dense = {Keep(k.bits, k.group) for k in widths.modules.values()}
    found = ", ".join(sorted(f"{k.code} bits, groups of {k.group}" for k in experts | dense))
    for of, name, mend in (
        (experts, "experts", "--recipe uniform --bits 4"),
        (dense, "other weights", "--set rest.attention=4 --set rest.shared=4 --set rest.dense=4"),
    ):
        if len(of) > 1:
            raise PlanError(
                f"{name} have several widths ({found}), and compressed-tensors is loaded as if they had "
                f"one; compress with {mend}, or export --to auto-round"
            )
        for keep in of:
            if keep.bits not in BITS or keep.group not in GROUPS:
                raise PlanError(
                    f"{name} have {keep.code} bits in groups of {keep.group}, and vLLM's fused kernels "
                    f"take 4 or 8 bits in groups of 32, 64 or 128; compress with {mend} --set group=64"
                )
    (only,) = experts
    return only, next(iter(dense), None)


def _check_columns(name: str, packed: Packed) -> None:
    if packed.columns % packed.group:
        raise PlanError(
            f"{name} has {packed.columns} columns, no whole groups of {packed.group}, which vLLM wants; "
            "compress with a smaller group (--set group=32)"
        )


def _coded(prefix: str, packed: Packed, tally: Tally) -> dict[str, Tensor]:
    """The tensors of a matrix; codes are kept where the middle is, or can be, their zero point."""
    codes, scale = centred(packed)
    middle = 2 ** (packed.bits - 1)
    rows = codes.shape[0]
    made = {
        "weight_packed": pack(codes + middle, packed.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, packed.columns]),
    }
    new = codes * scale.float().repeat_interleave(packed.group, -1)
    size = sum(t.nbytes for t in made.values())
    tally.add(packed.bits, f"int{packed.bits} g{packed.group}", size, packed.dequantize(), new)
    return {prefix + name: t for name, t in made.items()}


def centred(packed: Packed) -> tuple[Int[Tensor, "M N"], Float16[Tensor, "M G"]]:
    """(codes around 0, fp16 scales): the very codes, or the weights rounded to nearest once more."""
    low, n = -(2 ** (packed.bits - 1)), packed.columns
    if packed.zero is not None and not bool(packed.zero.frac().any()):
        zero = packed.zero.float().repeat_interleave(packed.group, -1)[:, :n]
        codes = unpack(packed.codes, packed.bits, n) - zero
        if low <= float(codes.min()) and float(codes.max()) < -low:
            return codes.int(), packed.scale
    clip = clip_of("wide", "middle")
    codes, scale, _ = round_to_nearest(packed.dequantize(), packed.bits, packed.group, clip)
    return codes + low, scale.half()


def _group(keep: Keep, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": FORMAT,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": keep.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": keep.group,
            "dynamic": False,
            "actorder": None,
        },
    }
