"""Packed experts of many widths: runs of as many channels, each stored and run as an expert of its own.

A run is as long as the greatest number that divides the widths of a layer's experts and that they had. An
expert of fewer channels has fewer runs, all of its bits; a token that picks it runs those that are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int32
from torch import Tensor

from moecule.plan import Keep

ID_BYTES = 4  # int32, of every run that an expert could have


def run_of(keeps: Sequence[Keep], full: int) -> int | None:
    """Channels of a run; None where all experts have one width, or stay at 16 bits."""
    widths = {full if k.channels is None else k.channels for k in keeps}
    if len(widths) == 1 or all(k.bits == 16 for k in keeps):
        return None
    return math.gcd(full, *widths)


def counts_of(keeps: Sequence[Keep], full: int, run: int) -> list[int]:
    """How many runs each expert has."""
    return [(full if k.channels is None else k.channels) // run for k in keeps]


def in_runs(keeps: Sequence[Keep], full: int) -> list[Keep]:
    """The experts cut into as many pieces each, of which those of 0 bits are not there.

    As they are where `run_of` gives None.
    """
    run = run_of(keeps, full)
    if run is None:
        return list(keeps)
    most, counts = full // run, counts_of(keeps, full, run)
    return [
        replace(k, channels=None, pieces=(k.bits,) * n + (0,) * (most - n))
        for k, n in zip(keeps, counts, strict=True)
    ]


def ids_of(keeps: Sequence[Keep], full: int, run: int) -> Int32[Tensor, "n runs"]:
    """The number of every run of each expert, and of nobody; past the last where there is none."""
    counts = counts_of(keeps, full, run)
    ids = torch.full((len(keeps) + 1, full // run), sum(counts), dtype=torch.int32)
    first = 0
    for row, n in zip(ids, counts, strict=False):
        row[:n] = torch.arange(first, first + n)
        first += n
    return ids


def ids_bytes(n: int, full: int, run: int) -> int:
    """What `ids_of` takes of n experts."""
    return (n + 1) * (full // run) * ID_BYTES
