"""The packed form holds what was put in, where the format says, and no more bytes than it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moecule.packed import (
    BLOCK,
    WIDTHS,
    Packed,
    affine,
    pack,
    packed_bytes,
    parts,
    unpack,
    words_per_row,
)

widths = st.sampled_from(WIDTHS)
columns = st.integers(1, 3 * BLOCK + 1)
leads = st.lists(st.integers(1, 3), max_size=2)
seeds = st.integers(0, 2**32 - 1)


def random_codes(bits: int, *shape: int, seed: int = 0) -> Tensor:
    """Codes of all values that fit."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=draw, dtype=torch.int32)


def random_packed(bits: int, rows: int, n: int, group: int, seed: int) -> tuple[Tensor, Packed]:
    """Codes, and the weight packed of them with random scales and zero points."""
    draw, groups = torch.Generator().manual_seed(seed), -(-n // group)
    codes = random_codes(bits, rows, n, seed=seed)
    scale = torch.rand(rows, groups, generator=draw).half()
    zero = (2**bits * torch.rand(rows, groups, generator=draw)).half()
    packed = Packed(pack(codes, bits), scale, None if bits == 1 else zero, bits, group, n)
    return codes, packed


@given(widths, leads, st.integers(1, 4), columns, seeds)
def test_unpacking_gives_back_what_was_packed(bits, lead, rows, n, seed):
    codes = random_codes(bits, *lead, rows, n, seed=seed)
    assert torch.equal(unpack(pack(codes, bits), bits, n), codes)


@given(widths, columns)
def test_the_largest_codes_survive_the_sign_of_int32(bits, n):
    codes = torch.full((1, n), 2**bits - 1, dtype=torch.int32)
    assert torch.equal(unpack(pack(codes, bits), bits, n), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_bit_lies_where_the_format_says(bits):
    n = 2 * BLOCK
    (row,) = random_codes(bits, 1, n, seed=bits).tolist()
    words = [w & 0xFFFFFFFF for w in pack(torch.tensor([row]), bits)[0].tolist()]
    low = start = 0
    for b in parts(bits):
        for k, code in enumerate(row):
            word = words[start + k // BLOCK * b + k % BLOCK // (BLOCK // b)]
            assert word >> b * (k % BLOCK % (BLOCK // b)) & 2**b - 1 == code >> low & 2**b - 1
        low, start = low + b, start + n // BLOCK * b
    assert start == len(words)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_width_is_the_sum_of_its_parts_widest_first(bits):
    assert sum(parts(bits)) == bits
    assert parts(bits) == sorted(set(parts(bits)), reverse=True)
    assert set(parts(bits)) <= {1, 2, 4, 8}


@given(widths, st.integers(1, 3), columns, st.integers(1, 70), seeds)
def test_the_bytes_told_are_the_bytes_stored(bits, rows, n, group, seed):
    _, packed = random_packed(bits, rows, n, group, seed)
    assert packed.codes.shape == (rows, words_per_row(bits, n))
    assert packed_bytes(bits, rows, n, group) == packed.size_bytes
    tensors = (packed.codes, packed.scale, packed.zero)
    assert packed.size_bytes == sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


@given(widths, columns, seeds)
def test_columns_pad_with_zeros_to_32_and_no_further(bits, n, seed):
    codes = random_codes(bits, 1, n, seed=seed)
    full = torch.nn.functional.pad(codes, (0, -n % BLOCK))
    assert torch.equal(pack(codes, bits), pack(full, bits))
    assert pack(full, bits).numel() * 32 == full.numel() * bits  # not a bit to spare


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("wrong", [-1, "top"])
def test_a_code_that_does_not_fit_is_refused(bits, wrong):
    codes = torch.zeros(2, 5, dtype=torch.int32)
    codes[1, 3] = 2**bits if wrong == "top" else wrong
    with pytest.raises(ValueError, match=f"{bits} bits"):
        pack(codes, bits)


@pytest.mark.parametrize("bits", [0, 9, -1, 16])
def test_a_width_outside_1_to_8_is_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        parts(bits)


@given(widths, st.integers(1, 3), columns, st.integers(1, 40), seeds)
def test_dequantizing_is_the_affine_formula_weight_by_weight(bits, rows, n, group, seed):
    codes, packed = random_packed(bits, rows, n, group, seed)
    got = packed.dequantize()
    for m in range(rows):
        for k in range(n):
            zero = 0.5 if packed.zero is None else packed.zero[m, k // group].float()
            want = (codes[m, k].float() - zero) * packed.scale[m, k // group].float()
            assert got[m, k] == want
    assert torch.equal(got, affine(codes, packed.scale, packed.zero, group))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dequantizing_rounds_once_after_float32(dtype):
    _, packed = random_packed(5, 4, 50, 16, seed=1)
    assert torch.equal(packed.dequantize(dtype), packed.dequantize().to(dtype))
