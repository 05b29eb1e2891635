"""What rounding activations to int8 does to a compressed model's loss, and to its speed on this CPU.

    python experiments/kernels/activations.py MODEL [MODEL ...] --text TEXT [--windows 8]

All products with packed weights are made from the codes, as while decoding, once exactly and once
with activations rounded, 32 to a scale; the losses are compared window by window.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moecule.data import all_windows, read_texts
from moecule.kernels import cpu
from moecule.measure import confidence, device_name, speed, window_losses
from moecule.runtime import set_exact
from moecule.session import Compute, load, tokenizer_of


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    print(f"{device_name(torch.device('cpu'))}\n")
    print("| | loss, exact | int8 adds | 95 % | decoded tokens/s, exact | int8 |")
    print("|---|--:|--:|--:|--:|--:|")
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
        more, half = confidence(losses[1] - losses[0])
        print(
            f"| {folder.name} | {losses[0].mean():.4f} | {more:+.5f} | {half:.5f} | "
            f"{rates[0]:.1f} | {rates[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
