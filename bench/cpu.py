"""What a product with packed weights takes on this CPU, beside bf16 and what reading the bytes takes.

    python -m bench.cpu [--threads N] [-o RESULT.json]

One expert's matrix at a time, many in turn so that none stays in a cache. The floor is the bytes of
the codes, scales and zero points at the rate at which this machine reads a large tensor in the run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moecule.kernels import cpu
from moecule.measure import device_name
from moecule.packed import Packed, words_per_row

SHAPES = {"Mixtral gate or up": (14336, 4096), "Qwen3-30B gate or up": (768, 2048)}
BYTES = 3 * 10**8  # of all weights of a kind together, which no cache holds
GROUP = 128


def random_packed(bits: int, rows: int, columns: int) -> Packed:
    """Codes at random; what they stand for does not matter here."""
    codes = torch.randint(-(2**31), 2**31 - 1, (rows, words_per_row(bits, columns)))
    halves = [torch.rand(rows, columns // GROUP).half() for _ in range(2)]
    zero = None if bits == 1 else halves[1]
    return Packed(codes.int(), halves[0], zero, bits, GROUP, columns)


def seconds(work: Callable[[int], object], n: int) -> float:
    """Of one of n in turn, the best of five rounds after one to warm up."""
    rounds = []
    for _ in range(6):
        start = time.perf_counter()
        for i in range(n):
            work(i)
        rounds.append((time.perf_counter() - start) / n)
    return min(rounds[1:])


def read_rate() -> float:
    """Bytes a second, reading a tensor that no cache holds."""
    large = torch.ones(BYTES // 8, dtype=torch.int64)
    return BYTES / seconds(lambda _: large.sum(), 1)


def row(name: str, rows: int, columns: int, bits: int, tokens: int, rate: float) -> dict[str, Any]:
    """One line: times of bf16 and of both paths, and the floor."""
    n = BYTES // (2 * rows * columns) + 1
    dense = [torch.randn(rows, columns).bfloat16() for _ in range(n)]
    x = torch.randn(tokens, columns)
    half = x.bfloat16()
    base = seconds(lambda i: torch.nn.functional.linear(half, dense[i]), n)
    dense.clear()
    n = BYTES // (rows * columns * bits // 8) + 1
    weights = [random_packed(bits, rows, columns) for _ in range(n)]
    jobs = [cpu.Job.of(w) for w in weights]
    int8, exact = (
        seconds(lambda i, how=how: cpu.multiply([jobs[i]], x, [tokens], rows, exact=how), n)
        for how in (False, True)
    )
    unpacked = seconds(lambda i: cpu.dequantize(weights[i]), min(n, 8))
    return {
        "shape": name, "bits": bits, "tokens": tokens, "bf16_ms": 1e3 * base, "int8_ms": 1e3 * int8,
        "exact_ms": 1e3 * exact, "floor_ms": 1e3 * weights[0].size_bytes / rate,
        "unpack_ms": 1e3 * unpacked, "int8_over_bf16": base / int8, "exact_over_bf16": base / exact,
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate = read_rate()
    print(f"{device_name(torch.device('cpu'))}; reads {rate / 1e9:.1f} GB/s; form {cpu.best()}\n")
    print(
        "| | bits | tokens | bf16 linear, ms | int8, ms | exact, ms | floor, ms | int8 is | exact is |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    found = []
    for name, (rows, columns) in SHAPES.items():
        for tokens in (1, 4, 16):
            for bits in (1, 2, 3, 4, 8) if tokens == 1 else (2, 3):
                r = row(name, rows, columns, bits, tokens, rate)
                found.append(r)
                print(
                    f"| {name} | {bits} | {tokens} | {r['bf16_ms']:.3f} | {r['int8_ms']:.3f} | "
                    f"{r['exact_ms']:.3f} | {r['floor_ms']:.3f} | {r['int8_over_bf16']:.1f} x | "
                    f"{r['exact_over_bf16']:.1f} x |",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
