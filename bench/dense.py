"""Packed Linears on a GPU: attention's and the output layer's, packed, beside bf16 and torch's own int4.

    python -m bench.dense [--bits 4 8] [-o RESULT.json]

Microseconds of a product, captured and replayed as in bench.kernels, with as many weights in turn as no
cache holds. Codes read anew for each token, activations rounded and exact; grouped products, as of one
expert; the weight unpacked, then multiplied. The floor is the packed weight's bytes at the rate at which
this GPU reads a large tensor in the run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.kernels import GROUP, fill, read_rate, replayed
from moecule import dense, runtime
from moecule.kernels import ops, unpack
from moecule.kernels.matrices import Matrices
from moecule.measure import device_name
from moecule.plan import Keep

WEIGHTS = {  # name: rows, columns
    "Mixtral q, o": (4096, 4096),
    "Mixtral k, v": (1024, 4096),
    "Mixtral output": (32000, 4096),
    "Qwen3-30B q": (4096, 2048),
    "Qwen3-30B o": (2048, 4096),
    "Qwen3-30B k, v": (512, 2048),
    "Qwen3-30B output": (151936, 2048),
}
TOKENS = (1, 2, 4, 8, 12, 16, 20, 24, 32, 64, 256)
MOST_CODES = 32  # tokens up to which codes are read anew
MOST_EXACT = 2
CACHED = 2**27  # bytes, more than a GPU's caches hold
WAYS = ("codes", "exact", "grouped", "grouped_int8", "unpacked")
PEERS = ("int4", "bf16")


def packed_linear(rows: int, columns: int, bits: int) -> Any:
    module = nn.Linear(columns, rows, bias=False, device="meta")
    runtime.prepare_weight(module, Keep(bits, GROUP))
    fill(module.to_empty(device="cuda"), 0.01)
    return module


def products(tokens: int) -> dict[str, Callable[[torch.Tensor, Matrices], object]]:
    """{way: product} of so many tokens."""
    made: dict[str, Callable[[torch.Tensor, Matrices], object]] = {
        "grouped": lambda x, of: dense.tiled(x, of, exact=True),
        "grouped_int8": lambda x, of: dense.tiled(x, of, exact=False),
        "unpacked": lambda x, of: nn.functional.linear(x, unpack.unpacked(of, 0, x.dtype)),
    }
    if tokens <= MOST_CODES:
        made["codes"] = lambda x, of: ops.products(ops.rounded(x, of), of, None, 1, x)
    if tokens <= MOST_EXACT:
        made["exact"] = lambda x, of: ops.products([x], of, None, 1, x)
    return made


@torch.no_grad()
def rows_of(name: str, bits: int, rate: float) -> list[dict[str, Any]]:
    """A line for each number of tokens."""
    rows, columns = WEIGHTS[name]
    stored = rows * columns * bits // 8
    modules = [packed_linear(rows, columns, bits) for _ in range(max(2, min(64, CACHED // stored)))]
    weights = [dense.weight_there(module) for module in modules]
    plain = [
        torch.randn(rows, columns, device="cuda").bfloat16()
        for _ in range(max(2, min(64, CACHED // stored // 2)))
    ]
    codes = torch.randint(-(2**31), 2**31 - 1, (rows // 8, columns // 128, 32, 4), device="cuda")
    int4 = [codes.int().clone() for _ in modules]
    scales = torch.rand(columns // GROUP, rows, 2, device="cuda").bfloat16()
    nbytes = sum(t.nbytes for t in modules[0].buffers())
    made = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        row: dict[str, Any] = {"weight": name, "bits": bits, "tokens": tokens}
        row["floor_us"] = 1e6 * nbytes / rate
        for way, product in products(tokens).items():
            row[f"{way}_us"] = replayed(product, [(x, of) for of in weights])
        row["bf16_us"] = replayed(nn.functional.linear, [(x, weight) for weight in plain])
        if bits == 4:
            turns = [(x, codes, GROUP, scales) for codes in int4]
            row["int4_us"] = replayed(torch.ops.aten._weight_int4pack_mm, turns)
        made.append(row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    rate = read_rate()
    print(f"{device_name(torch.device('cuda'))}, reads {rate / 1e12:.2f} TB/s", flush=True)
    columns = ("floor", *WAYS, *PEERS)
    print(f"| | bits | tokens | {' | '.join(columns)} |")
    print("|---|" + "--:|" * (len(columns) + 2), flush=True)
    made = []
    for bits in args.bits:
        for name in WEIGHTS:
            for row in rows_of(name, bits, rate):
                made.append(row)
                times = [row.get(f"{c}_us") for c in columns]
                shown = " | ".join("" if t is None else f"{t:.1f}" for t in times)
                print(f"| {name} | {bits} | {row['tokens']} | {shown} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
