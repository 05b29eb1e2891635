"""What is counted of experts on a GPU: reproducible, and nothing waits for it. CI has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moecule.grid import CLIPS, quantized_at
from moecule.stats import BINS, histograms

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, what waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [0, 5000])
def test_histograms_are_those_of_the_cpu(tokens):
    g = torch.Generator().manual_seed(0)
    value, weight = torch.rand(tokens, generator=g), torch.rand(tokens, generator=g).double()
    row = torch.randint(0, 4, (tokens,), generator=g)
    there = [t.cuda() for t in (value, row, weight)]
    with no_waiting():
        counted = histograms(there[0], there[1], 4)
        first, again = (histograms(there[0], there[1], 4, there[2]) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (4, BINS)
    assert torch.equal(counted.cpu(), histograms(value, row, 4))
    torch.testing.assert_close(first.cpu(), histograms(value, row, 4, weight), rtol=1e-12, atol=0)


def test_trials_of_one_expert_after_the_other_do_not_wait():
    w = torch.randn(24, 128, device="cuda")
    quantized_at(w, (1, 2, 3), 64, CLIPS["wide"])  # the kernel is compiled, the numbers are sent
    with no_waiting():
        quantized_at(w, (1, 2, 3), 64, CLIPS["wide"])
