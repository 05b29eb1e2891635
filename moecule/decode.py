"""Sources that are quantised already, seen as what they would be in bf16.

    method              on disk                                     one scale for
    fp8                 X F8, X_scale_inv or X_scale                a block of rows and columns, or all
    compressed-tensors  X F8, X_scale (float-quantized)             all, a row, or a block
    mxfp4               X_blocks U8 (two codes a byte), X_scales    32 columns of a row

X may be a stack of experts. The product of code and scale is rounded once, to bf16. What has no
scale is taken as it is. An mxfp4 X is the transpose of its rows, as gpt_oss holds it in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import BFloat16, Float, Shaped, UInt8
from torch import Tensor

from moecule.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
CACHED = 2**18  # numbers of float32 that a core is at work on at a time
QUANTISED = "quantization_config"  # transformers' key
DECODED = "fp8, mxfp4 (of gpt_oss) and compressed-tensors float-quantized (8 bits)"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# what says how activations were rounded, and zero points of symmetric codes: weights need neither
_UNUSED = ("input_scale", "output_scale", "activation_scale", "_zero_point")

Block = tuple[int | None, int | None]  # rows, columns that share a scale; None: all of them


@dataclass(frozen=True)
class Coded:
    """What of the disk a quantised tensor is made of."""

    codes: str  # the tensors' names on disk
    scale: str
    block: tuple[int, int]  # rows, columns that share a scale
    bits: int  # of a code
    size_bytes: int  # codes and scales


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and what it is once read."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    coded: Coded | None = None  # where it is quantised

    def __str__(self) -> str:
        return f"{NAMES[self.dtype]} {[*self.shape]}"

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, scales counted."""
        return self.coded.size_bytes if self.coded else self.decoded_bytes

    @property
    def decoded_bytes(self) -> int:
        """Bytes once read."""
        return self.dtype.itemsize * self.numel

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantised, as its config.json has it."""

    method: str
    blocks: tuple[Block, ...] = ()  # any of these; the shape of a tensor's scale tells which
    scale_bytes: bool = False  # U8 scales are powers of two, E8M0


def scheme_of(config: Mapping[str, Any], where: str) -> Scheme | None:
    """What config.json says; None where nothing is quantised, or only by this package.

    `where` begins a message. Raises CheckpointError for what is not decoded here.
    """
    how = config.get(QUANTISED)
    if how is None or config["model_type"] == "moecule":
        return None
    method = how.get("quant_method")
    if method == "fp8":
        if how.get("expert_dtype", "fp8") != "fp8":
            raise _refused(where, method, f"experts of {how['expert_dtype']}")
        block = _block(how.get("weight_block_size"), "weight_block_size", where)
        return Scheme(method, (block,), how.get("scale_fmt") == "ue8m0")
    if method == "mxfp4":
        if config["model_type"] != "gpt_oss":
            raise _refused(where, method, config["model_type"])
        return Scheme(method)
    if method == "compressed-tensors":
        return Scheme(method, _compressed_blocks(how, where))
    raise _refused(where, method)


def _refused(where: str, method: Any, kind: Any = None) -> CheckpointError:
    found = f"{method!r}" if kind is None else f"{method!r} ({kind})"
    return CheckpointError(
        f"{where} is quantised by {found}; decoded are {DECODED}; give its bf16 original"
    )


def _damaged(where: str, said: str) -> CheckpointError:
    return CheckpointError(f"{where}: {said}; fetch it again")


def _block(size: Any, key: str, where: str) -> Block:
    if size is None:
        return (None, None)
    pair = isinstance(size, list) and len(size) == 2
    if not pair or not all(type(n) is int and n > 0 for n in size):
        raise _damaged(where, f"config.json: {key} is {size!r}, wanted two numbers above 0")
    return (size[0], size[1])


def _compressed_blocks(how: Mapping[str, Any], where: str) -> tuple[Block, ...]:
    """What may share a scale, over all config groups."""
    kind, method, groups = how.get("format"), "compressed-tensors", how.get("config_groups")
    if kind != "float-quantized":
        raise _refused(where, method, kind)
    sparse = how.get("sparsity_config") or {"format": "dense"}
    if not isinstance(sparse, dict) or sparse.get("format") != "dense":
        raise _refused(where, method, "sparse")
    if how.get("transform_config"):  # rotations that the model must undo as it runs
        raise _refused(where, method, "transformed")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise _damaged(where, "config.json: config_groups is no table of tables")
    blocks: dict[Block, None] = {}
    for group in groups.values():
        weights = group.get("weights")
        if weights is None:  # activations only
            continue
        if not isinstance(weights, dict) or group.get("format") not in (None, kind):
            raise _refused(where, method, group.get("format"))
        bits, type_ = weights.get("num_bits"), weights.get("type")
        if (bits, type_) != (8, "float") or weights.get("symmetric") is False:
            kind = "with zero points" if weights.get("symmetric") is False else f"{bits} bits"
            raise _refused(where, method, f"{type_}, {kind}")
        strategy, size = weights.get("strategy") or "tensor", weights.get("block_structure")
        if strategy == "block":
            blocks[_block(size or "missing", "block_structure", where)] = None
        elif strategy in ("tensor", "channel"):
            blocks[(None if strategy == "tensor" else 1, None)] = None
        else:
            raise _refused(where, method, f"a scale a {strategy}")
    if sum(b[1] is not None for b in blocks) > 1:  # one shape of scales could mean either
        raise _refused(where, method, "blocks of several sizes")
    return tuple(blocks)


def decoded_view(
    stored: Mapping[str, TensorInfo], scheme: Scheme | None, where: str
) -> dict[str, TensorInfo]:
    """The tensors that the model would have unquantised, from those on disk.

    Raises CheckpointError where codes and scales do not belong together.
    """
    if scheme is None:
        out = dict(stored)
    elif scheme.method == "mxfp4":
        out = _mxfp4_view(stored, where)
    else:
        out = _fp8_view(stored, scheme, where)
    for name, info in out.items():
        if info.dtype in (*FP8, torch.float8_e8m0fnu):
            lacks = "config.json does not say how" if scheme is None else f"no {name}_scale_inv"
            raise CheckpointError(
                f"{where}: {name} is {NAMES[info.dtype]}, which a scale must go with: {lacks}; "
                "fetch it again, or give the bf16 original"
            )
    if scheme is not None and not any(info.coded for info in out.values()):
        raise _damaged(where, f"config.json says {scheme.method}, and no tensor is quantised")
    return out


def _fp8_view(
    stored: Mapping[str, TensorInfo], scheme: Scheme, where: str
) -> dict[str, TensorInfo]:
    out: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        scaled = name.removesuffix("_inv").removesuffix("_scale")
        if scaled != name and scaled in stored:  # the scale of another
            continue
        if name.endswith(("_scale_inv", "weight_scale")):
            raise _damaged(where, f"{name} has no {scaled}")
        if not name.endswith(_UNUSED):
            scale = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in stored), None)
            out[name] = info if scale is None else _fp8(name, scale, stored, scheme, where)
    return out


def _fp8(
    name: str, scale: str, stored: Mapping[str, TensorInfo], scheme: Scheme, where: str
) -> TensorInfo:
    codes, by = stored[name], stored[scale]
    if codes.dtype not in FP8 or len(codes.shape) not in (2, 3) or 0 in codes.shape:
        raise _damaged(where, f"{name} is {codes} and has a scale, which F8_E4M3 matrices have")
    if by.dtype not in SCALES and not (scheme.scale_bytes and by.dtype == torch.uint8):
        wanted = ", ".join(NAMES[d] for d in SCALES)
        raise _damaged(where, f"{scale} is {by}, wanted {wanted}")
    for block in scheme.blocks:
        whole = _fitting(codes.shape, by.shape, block)
        if whole is not None:
            coded = Coded(name, scale, whole, 8, codes.size_bytes + by.size_bytes)
            return TensorInfo(codes.file, torch.bfloat16, codes.shape, coded)
    wanted = " or ".join(map(_said, scheme.blocks)) or "no scale, as config.json has it"
    raise _damaged(where, f"{scale} is {by}, which does not fit {name}, {codes}, with {wanted}")


def _said(block: Block) -> str:
    if block == (None, None):
        return "one scale (config.json has no block size)"
    return "a scale a row" if block[1] is None else f"a scale a block of {block[0]} x {block[1]}"


def _fitting(
    shape: tuple[int, ...], scales: tuple[int, ...], block: Block
) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None where scales of that shape mean another thing."""
    *lead, m, n = shape
    rows, columns = block[0] or m, block[1] or n
    if block == (None, None) and not lead and scales in ((), (1,)):
        return rows, columns
    if block == (None, None) and lead and scales == (*lead, 2, 1) and m % 2 == 0:
        return m // 2, columns  # stacked gate over up, each with its own
    if lead and m % rows:  # a half-filled block may end the gate, the up, or both
        return None
    return (rows, columns) if scales == (*lead, -(-m // rows), -(-n // columns)) else None


def _mxfp4_view(stored: Mapping[str, TensorInfo], where: str) -> dict[str, TensorInfo]:
    out: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        if name.endswith("_blocks"):
            out[name.removesuffix("_blocks")] = _mxfp4(name, stored, where)
        elif not name.endswith("_scales"):
            out[name] = info
        elif f"{name.removesuffix('_scales')}_blocks" not in stored:
            raise _damaged(where, f"{name} has no blocks")
    return out


def _mxfp4(name: str, stored: Mapping[str, TensorInfo], where: str) -> TensorInfo:
    codes, scale = stored[name], f"{name.removesuffix('_blocks')}_scales"
    if codes.dtype != torch.uint8 or len(codes.shape) != 4 or codes.shape[-1] != 16:
        raise _damaged(where, f"{name} is {codes}, wanted U8 [experts, rows, columns / 32, 16]")
    if scale not in stored:
        raise _damaged(where, f"{name} has no {scale}")
    by = stored[scale]
    if by.dtype != torch.uint8 or by.shape != codes.shape[:-1]:
        raise _damaged(where, f"{scale} is {by}, wanted U8 {[*codes.shape[:-1]]}")
    experts, rows, groups, _ = codes.shape
    coded = Coded(name, scale, (1, 32), 4, codes.size_bytes + by.size_bytes)
    return TensorInfo(codes.file, torch.bfloat16, (experts, 32 * groups, rows), coded)


def decode(
    info: TensorInfo, found: Mapping[str, Tensor], where: str, device: torch.device | None = None
) -> BFloat16[Tensor, "*shape"]:
    """The tensor, from its codes and scales by their names on disk; made on `device`, if given.

    Raises CheckpointError where a scale is NaN or Inf.
    """
    coded = info.coded
    assert coded is not None  # else there is nothing to decode
    codes, scale = found[coded.codes], found[coded.scale]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.float()
    if not torch.isfinite(scale).all():
        raise CheckpointError(
            f"{where}: {coded.scale} holds NaN or Inf; the checkpoint is damaged, fetch it again"
        )
    codes, scale = (t.to(device, non_blocking=True) for t in (codes, scale))
    if coded.bits == 4:
        return decode_mxfp4(codes, scale.to(torch.bfloat16))
    *lead, m, n = info.shape
    rows, columns = coded.block
    return decode_fp8(codes, scale.reshape(*lead, -(-m // rows), -1), rows, columns)


def decode_fp8(
    codes: Shaped[Tensor, "*E M N"], scale: Float[Tensor, "*E m n"], rows: int, columns: int
) -> BFloat16[Tensor, "*E M N"]:
    """Codes times scales; `rows` x `columns` share one, the last ones of an edge may be fewer."""
    out = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    m, n = codes.shape[-2:]
    by_column = scale if columns >= n else scale.repeat_interleave(columns, -1)[..., :n]
    # few enough to stay in the processor's cache from step to step
    step = m if codes.is_cuda else max(1, torch.get_num_threads() * CACHED // n)
    run = max(rows, step // rows * rows)  # a run ends where a scale does
    pieces = [
        (i, min(i + step, b + run, m))
        for b in range(0, m, run)
        for i in range(b, min(b + run, m), step)
    ]
    for to, c, s in zip(
        *(t.flatten(0, -3) if t.dim() > 2 else t[None] for t in (out, codes, by_column)),
        strict=True,
    ):
        for i, end in pieces:
            of = s[i // rows : -(-end // rows)]
            w = _widened(c[i:end])
            to[i:end] = w.mul_(of if len(of) == 1 else of.repeat_interleave(rows, 0)[: end - i])
    return out


def _widened(codes: Shaped[Tensor, "m N"]) -> Float[Tensor, "m N"]:
    """In float32. By bits on a CPU, where torch's own conversion takes ten times as long."""
    if codes.is_cuda or codes.dtype != torch.float8_e4m3fn:
        return codes.float()
    bits = codes.view(torch.int8)
    if (bits & 127).max() == 127:  # NaN, which has no place among the numbers of a float16
        return codes.float()
    # sign to the sign, exponent and fraction to where float16 has them: 2**-8 of the number
    half = (bits.to(torch.int16) << 7).bitwise_and_(~0x4000).view(torch.float16)
    return half.float().mul_(256)


def decode_mxfp4(
    blocks: UInt8[Tensor, "E M G half"], scale: BFloat16[Tensor, "E M G"]
) -> BFloat16[Tensor, "E N M"]:
    """Low nibbles come first. Exact: codes have two bits, scales are powers of two."""
    there = blocks.device
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.bfloat16, device=there)
    byte = torch.arange(256, device=there)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=-1)
    e, m, g, half = blocks.shape
    out = torch.empty(e, 2 * g * half, m, dtype=torch.bfloat16, device=there)
    for to, b, s in zip(out, blocks, scale, strict=True):
        # a pair in one number: half as many to look up
        found = pairs.view(torch.int32).flatten().index_select(0, b.flatten().int())
        w = found.view(torch.bfloat16).view(m, g, 2 * half)
        to.copy_(w.mul_(s[..., None]).flatten(-2).mT)
    return out
