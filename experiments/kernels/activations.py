"""What rounding activations to int8 does to a compressed model's loss, and to its speed on this CPU.

    python experiments/kernels/activations.py MODEL [MODEL ...] --text TEXT [--windows 8]

All products with packed weights are made from the codes, as while decoding, once exactly and once
with activations rounded, 32 to a scale; then the experts alone as a GPU rounds for many tokens, 128 to a
scale. The losses are compared window by window.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moecule import forward
from moecule.data import all_windows, read_texts
from moecule.kernels import cpu
from moecule.measure import confidence, device_name, speed, window_losses
from moecule.runtime import set_exact
from moecule.session import Compute, load, tokenizer_of


def rounded(x: Tensor) -> Tensor:
    """To int8, 128 columns to a scale, and back."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


def as_for_many(model: nn.Module, windows: Int[Tensor, "N S"]) -> Float[Tensor, " N"]:
    """Losses with what enters the experts' matrices rounded so."""
    plain = forward._product

    def product(module: Any, name: str, x: Tensor, *how: Any) -> Tensor:
        return plain(module, name, rounded(x), *how)

    with patch.object(forward, "_product", product):
        return window_losses(model, windows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    print(f"{device_name(torch.device('cpu'))}\n")
    print("| | loss, exact | int8 adds | 95 % | 128 to a scale | 95 % | tokens/s, exact | int8 |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for folder in args.models:
        model = load(folder, Compute("cpu", "float32"))
        texts = read_texts(args.text)
        windows = all_windows(tokenizer_of(folder), texts, args.length)[: args.windows]
        rates, losses, few = [], [], cpu.FEW
        for exact in (True, False):
            set_exact(model, exact)
            with torch.no_grad():
                rates.append(speed(model, windows[:1])[1])
            cpu.FEW = 10**9  # every product from the codes, however many tokens
            losses.append(window_losses(model, windows))
            cpu.FEW = few
        set_exact(model, True)
        losses.append(as_for_many(model, windows))
        more, half = confidence(losses[1] - losses[0])
        wide, wide_half = confidence(losses[2] - losses[0])
        print(
            f"| {folder.name} | {losses[0].mean():.4f} | {more:+.5f} | {half:.5f} | "
            f"{wide:+.5f} | {wide_half:.5f} | "
            f"{rates[0]:.1f} | {rates[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
