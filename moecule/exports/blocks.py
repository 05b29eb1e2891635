"""Weights as blocks of ggml's types: codes kept where a type holds them, encoded anew where none does.

Layouts are those of the gguf package's decoders (gguf.quants), 32 columns to a block, d and m fp16:

    Q4_0  w = d (q - 8)    Q4_1  w = d q + m    q: byte j holds columns j and j + 16
    Q5_0  w = d (q - 16)   Q5_1  w = d q + m    the fifth bits: bit j of a 32-bit word
    Q8_0  w = d q          q int8

All else (Q2_K and such) is encoded by llama.cpp itself, where llama-cpp-python is installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from moecule.errors import RecipeError
from moecule.exports.contents import Weight
from moecule.packed import Packed, unpack

T = GGMLQuantizationType
BLOCK = 32
# what holds codes, the smallest first: bits of a code, and whether blocks have a minimum
KEEPING = {
    T.Q4_0: (4, False),
    T.Q4_1: (4, True),
    T.Q5_0: (5, False),
    T.Q5_1: (5, True),
    T.Q8_0: (8, False),
}
PLAIN = {torch.float32: T.F32, torch.float16: T.F16, torch.bfloat16: T.BF16}
WANTED = "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16, F32, and with llama-cpp-python Q2_K to Q6_K"


def type_of(name: str) -> GGMLQuantizationType:
    """ggml's type of that name. Raises RecipeError where there is none, or nothing here encodes it."""
    if name.upper() not in T.__members__:
        raise RecipeError(f"--type {name}: ggml has no such type; wanted one of {WANTED}")
    found = T[name.upper()]
    if found in KEEPING or found in PLAIN.values():
        return found
    library = _ggml()
    if library is None:
        raise RecipeError(
            f"--type {name} is encoded by llama.cpp alone, and llama-cpp-python is not installed: pip "
            f"install llama-cpp-python, or wanted {WANTED}"
        )
    if found not in _ENCODED or library.ggml_quantize_requires_imatrix(int(found)):
        raise RecipeError(
            f"--type {name} is not encoded here, or wants an importance matrix; wanted one of {WANTED}"
        )
    return found


_ENCODED = (T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ3_S, T.IQ4_NL, T.IQ4_XS, T.TQ1_0, T.TQ2_0)


def fits(kind: GGMLQuantizationType, columns: int) -> bool:
    """Whether rows of so many columns are whole blocks."""
    block: int = GGML_QUANT_SIZES[kind][0]
    return columns % block == 0


def choose_type(weights: Sequence[Weight]) -> GGMLQuantizationType:
    """The smallest type that keeps the codes of all; where none does, Q8_0, or F16 for odd widths."""
    first = weights[0].value
    if isinstance(first, Tensor):
        return PLAIN.get(first.dtype, T.F32)
    if not fits(T.Q8_0, first.columns):
        return T.F16
    packed = [w.value for w in weights if isinstance(w.value, Packed)]
    return next((kind for kind in KEEPING if all(holds(kind, p) for p in packed)), T.Q8_0)


def holds(kind: GGMLQuantizationType, packed: Packed) -> bool:
    """Whether the type has room for the very codes."""
    if kind not in KEEPING or not fits(kind, packed.columns):
        return False
    if packed.group % BLOCK and packed.group < packed.columns:  # a block would have two scales
        return False
    bits, has_minimum = KEEPING[kind]
    if has_minimum:
        return packed.bits <= bits
    if packed.zero is None or bool((packed.zero.frac() != 0).any()):
        return False
    low, high = -packed.zero.min(), 2**packed.bits - 1 - packed.zero.min()
    least = -packed.zero.max()
    half = 2 ** (bits - 1)
    return bool(min(low, least) >= -half and high <= half - 1)


def encoded(weight: Weight, kind: GGMLQuantizationType) -> UInt8[np.ndarray, "M bytes"]:
    """The bytes of a matrix's rows."""
    value = weight.value
    if isinstance(value, Packed) and holds(kind, value):
        return _kept(value, kind)
    dense = np.ascontiguousarray(weight.dense().numpy())
    if kind in (T.F32, T.F16, T.BF16) or kind in KEEPING:
        made: np.ndarray = quantize(dense, kind).view(np.uint8).reshape(len(dense), -1)
        return made
    return _by_llama_cpp(dense, kind)


def decoded(rows: UInt8[np.ndarray, "M bytes"], kind: GGMLQuantizationType) -> Float[Tensor, "M N"]:
    """What the bytes stand for, by the gguf package's own decoders."""
    return torch.from_numpy(np.asarray(dequantize(rows, kind), dtype=np.float32).copy())


def _kept(packed: Packed, kind: GGMLQuantizationType) -> UInt8[np.ndarray, "M bytes"]:
    bits, has_minimum = KEEPING[kind]
    n, codes = packed.columns, unpack(packed.codes, packed.bits, packed.columns)
    group = min(packed.group, n)
    scale, zero = (
        None if t is None else t.float().repeat_interleave(group, -1)[:, :n:BLOCK]
        for t in (packed.scale, packed.zero)
    )
    assert scale is not None
    zero = torch.full_like(scale, 0.5) if zero is None else zero
    parts = [_bytes(scale.half())]
    if has_minimum:
        parts.append(_bytes((-zero * scale).half()))
    else:
        middle = 0 if kind == T.Q8_0 else 2 ** (bits - 1)
        codes = codes - zero.int().repeat_interleave(BLOCK, -1) + middle
    blocks = codes.unflatten(-1, (-1, BLOCK))  # [M, N / 32, 32]
    if bits == 5:
        at = torch.arange(BLOCK, dtype=torch.int64)
        high = ((blocks >> 4 & 1).long() << at).sum(-1)
        parts.append(_bytes(torch.where(high >= 2**31, high - 2**32, high).int()))
    if bits == 8:
        parts.append(blocks.to(torch.int8).view(torch.uint8))
    else:
        low = blocks & 15
        parts.append((low[..., :16] | low[..., 16:] << 4).to(torch.uint8))
    made: np.ndarray = torch.cat(parts, -1).flatten(1).numpy()
    return made


def _bytes(
    numbers: Float[Tensor, "M blocks"] | Int[Tensor, "M blocks"],
) -> UInt8[Tensor, "M blocks b"]:
    """Of each number, little end first."""
    return numbers.contiguous()[..., None].view(torch.uint8)


def _ggml() -> Any:
    """llama.cpp's library, or None where llama-cpp-python is not installed."""
    try:
        from llama_cpp._ggml import libggml
    except (ImportError, OSError, RuntimeError):  # or built for another machine
        return None
    if not hasattr(libggml, "ggml_quantize_chunk"):
        return None
    libggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    libggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return libggml


def _by_llama_cpp(
    dense: Float[np.ndarray, "M N"], kind: GGMLQuantizationType
) -> UInt8[np.ndarray, "M bytes"]:
    """By llama.cpp's own encoder, without an importance matrix."""
    rows, n = dense.shape
    block, size = GGML_QUANT_SIZES[kind]
    made = np.empty((rows, n // block * size), dtype=np.uint8)
    as_floats = dense.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    counts = (ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(n))
    to = ctypes.c_void_p(made.ctypes.data)
    wrote = _ggml().ggml_quantize_chunk(int(kind), as_floats, to, *counts, None)
    assert wrote == made.nbytes  # as the type's own size says
    return made
