"""Codes decoded on a GPU are what the CPU makes of them, bit for bit. Needs a GPU; CI has none."""

from __future__ import annotations

import pytest
import torch

from moecule.decode import FP8, decode_fp8, decode_mxfp4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
BLOCKS = ((128, 128), (12, 20), (1, 300), (160, 300), (40, 7))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """In every bit but those of NaN."""
    number = ~a.isnan()
    alike = a.view(torch.int16)[number].equal(b.view(torch.int16)[number])
    return alike and number.equal(~b.isnan())


@pytest.mark.parametrize(("rows", "columns"), BLOCKS)
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_fp8(dtype, rows, columns):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 160, 300), dtype=torch.uint8, generator=g).view(dtype)
    scale = torch.rand(3, -(-160 // rows), -(-300 // columns), generator=g)
    made = decode_fp8(codes.cuda(), scale.cuda(), rows, columns)
    assert made.is_cuda and same(made.cpu(), decode_fp8(codes, scale, rows, columns))


def test_mxfp4():
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 64, 5, 16), dtype=torch.uint8, generator=g)
    power = torch.randint(1, 250, (3, 64, 5), dtype=torch.uint8, generator=g)
    scale = power.view(torch.float8_e8m0fnu).float().bfloat16()
    made = decode_mxfp4(blocks.cuda(), scale.cuda())
    assert made.is_cuda and same(made.cpu(), decode_mxfp4(blocks, scale))
