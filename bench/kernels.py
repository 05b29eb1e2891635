"""A layer's routed experts on a GPU: packed, beside bf16 and what reading the bytes takes.

    python -m bench.kernels [--sweep] [-o RESULT.json]

A layer of each full-size shape with random weights, half its experts of 3 bits and half of 2, groups of
128. Every time is that of one call among 16 with other tokens and another routing each, captured in one
CUDA graph and replayed; where weights are unpacked first, which waits for the GPU, by the clock. The
floor is the bytes of the experts hit at the rate at which this GPU reads a large tensor in the run; the
peers are bf16 through transformers' grouped_mm and, for one token, torch's own int4 product, one launch
an expert and matrix. "half skipped": every token's second half of experts is nobody. --sweep tries ways
to cut the products for one token. CPUs: bench.cpu.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bench.full_size import SHAPES, meta_model
from moecule import gpu, runtime
from moecule.family import load_family
from moecule.kernels import gemv
from moecule.measure import device_name
from moecule.moe import find_layers, find_moe
from moecule.packed import packed_of
from moecule.plan import Keep

TURNS = 16  # routings in turn, so that no cache holds what is read
GROUP = 128
SWEPT: tuple[dict[str, Any], ...] = (
    {}, {"early": True}, {"early": False}, {"stages": 1}, {"stages": 2}, {"stages": 3},
)  # fmt: skip
TOKENS = (1, 2, 4, 8, 16, 64, 256, 512, 4096)
EXACT = 2  # tokens up to which the exact path is timed
ROUTED = ("codes", "exact", "grouped", "grouped_int8", "unpacked")


def experts_module(name: str) -> Any:
    """Of the first layer, on meta."""
    model = meta_model(SHAPES[name], 1).requires_grad_(False)
    moe = find_moe(find_layers(model)[1][0], load_family(model.config.model_type))
    assert moe is not None  # both shapes have them in every layer
    return moe.experts


def fill(module: torch.nn.Module, scale: float) -> None:
    """Packed weights with random codes, scales up to `scale`."""
    for key, buffer in module.named_buffers():
        if key.endswith("_codes"):
            buffer.random_(-(2**31), 2**31 - 1)
        elif key.endswith(("_scale", "_zero")):
            most = scale if key.endswith("_scale") else 3.0
            buffer.copy_(torch.rand_like(buffer, dtype=torch.float16).mul_(most).view(torch.int16))


def packed_experts(name: str) -> Any:
    """Random codes; scales such that the layer's output stays finite."""
    module = experts_module(name)
    n = module.num_experts
    runtime.prepare_experts(module, [Keep(2 + e % 2, GROUP) for e in range(n)])
    fill(module.to_empty(device="cuda"), 0.01)
    return module


def plain_experts(name: str) -> Any:
    """The same layer in bf16."""
    module = experts_module(name).to_empty(device="cuda")
    for weight in module.parameters():
        weight.normal_(0, 0.02)
    return module


def replayed(work: Callable[..., object], turns: Sequence[tuple[Any, ...]]) -> float:
    """Microseconds of a call, captured in turns with one set of arguments each."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # by which the arguments are made
    with torch.cuda.stream(side):
        for given in turns[:2]:
            work(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in turns:
            work(*given)
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(turns))
    return sorted(times)[len(times) // 2]


def read_rate() -> float:
    """Bytes a second, reading a large tensor."""
    large = torch.ones(2**30, device="cuda")
    return 1e6 * large.nbytes / replayed(large.sum, [()] * 4)


def routings(module: Any, tokens: int, top_k: int) -> list[tuple[torch.Tensor, ...]]:
    """(hidden, idx, coef) for every turn."""
    width = width_of(module)
    out = []
    for _ in range(TURNS):
        scores = torch.rand(tokens, module.num_experts, device="cuda")
        coef, idx = scores.topk(top_k)
        hidden = torch.randn(tokens, width, device="cuda").bfloat16()
        out.append((hidden, idx, (coef / coef.sum(-1, keepdim=True)).bfloat16()))
    return out


def width_of(module: Any) -> int:
    """Columns of the first matrix."""
    if hasattr(module, "slots"):
        width: int = next(iter(module.packed.values())).shapes["gate_up"][1]
        return width
    return int(module.gate_up_proj.shape[-1])


def bytes_hit(module: Any, turns: list[tuple[torch.Tensor, ...]]) -> float:
    """Mean bytes of the packed experts that a turn needs."""
    sizes = []
    for kind, row in module.slots:
        stack = module.packed[kind]
        sizes.append(sum(packed_of(stack, n, row).size_bytes for n in stack.shapes))
    hit = [sum(sizes[e] for e in set(idx.flatten().tolist())) for _, idx, _ in turns]
    return sum(hit) / len(hit)


def by_clock(work: Callable[..., object], turns: Sequence[tuple[Any, ...]]) -> float:
    """Microseconds of a call that waits for the GPU."""
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for given in turns:
            work(*given)
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / len(turns)


def half_skipped(
    turns: list[tuple[torch.Tensor, ...]], nobody: int
) -> list[tuple[torch.Tensor, ...]]:
    """Each token's second half of experts is `nobody`."""
    out = []
    for hidden, idx, coef in turns:
        kept = torch.arange(idx.shape[1], device=idx.device) < idx.shape[1] // 2
        out.append((hidden, torch.where(kept, idx, nobody), coef))
    return out


@torch.no_grad()
def int4_us(name: str, turns: list[tuple[torch.Tensor, ...]]) -> float:
    """Microseconds of a token's experts by torch's int4 product, nothing between the matrices."""
    shape = SHAPES[name]
    hidden = shape["hidden_size"]
    inner = shape.get("moe_intermediate_size", shape["intermediate_size"])
    n = shape.get("num_local_experts", shape.get("num_experts"))
    kinds = []
    for m, k in ((2 * inner, hidden), (hidden, inner)):
        codes = torch.randint(-(2**31), 2**31 - 1, (n, m // 8, k // 128, 32, 4), device="cuda")
        scales = torch.rand(k // GROUP, m, 2, device="cuda").bfloat16()
        kinds.append((codes.int(), scales, torch.randn(1, k, device="cuda").bfloat16()))

    def token(experts: list[int]) -> None:
        for codes, scales, x in kinds:
            for e in experts:
                torch.ops.aten._weight_int4pack_mm(x, codes[e], GROUP, scales)

    return replayed(token, [(idx.flatten().tolist(),) for _, idx, _ in turns])


@torch.no_grad()
def rows(name: str, rate: float) -> list[dict[str, Any]]:
    """A line for each number of tokens."""
    top_k = SHAPES[name]["num_experts_per_tok"]
    packed, made = packed_experts(name), []
    found = gpu.experts_there(packed)
    assert found is not None  # the kernels serve this shape
    ways = (gpu._few, gpu._grouped, gpu._grouped_int8, gpu._unpacked)
    few, grouped, grouped_int8, unpacked = (partial(way, packed, *found) for way in ways)
    for tokens in TOKENS:
        turns = routings(packed, tokens, top_k)
        row = {"shape": name, "tokens": tokens, "floor_us": 1e6 * bytes_hit(packed, turns) / rate}
        made.append(row)
        each = tokens * top_k / packed.num_experts
        turns = turns if tokens < 512 else turns[:4]
        packed.exact = False
        if each <= 8:
            row["codes_us"] = replayed(few, turns)
        if tokens == 1:
            row["half_skipped_us"] = replayed(few, half_skipped(turns, packed.num_experts))
        if tokens <= EXACT:
            packed.exact = True
            row["exact_us"] = replayed(few, turns)
        row["grouped_us"] = replayed(grouped, turns)
        row["grouped_int8_us"] = replayed(grouped_int8, turns)
        if tokens >= 64:
            row["unpacked_us"] = by_clock(unpacked, turns)
        taken = min((way for way in ROUTED if f"{way}_us" in row), key=lambda w: row[f"{w}_us"])
        row["best"] = taken
    del packed, found, few, grouped, grouped_int8, unpacked
    plain = plain_experts(name)
    made[0]["int4_us"] = int4_us(name, routings(plain, 1, top_k))
    for row in made:
        turns = routings(plain, row["tokens"], top_k)
        turns = turns if row["tokens"] < 512 else turns[:4]
        row["bf16_us"] = replayed(partial(ALL_EXPERTS_FUNCTIONS["grouped_mm"], plain), turns)
    return made


@torch.no_grad()
def sweep(name: str) -> None:
    """Other ways to cut both products for one token, by the time of the whole layer."""
    top_k, packed = SHAPES[name]["num_experts_per_tok"], packed_experts(name)
    found = gpu.experts_there(packed)
    assert found is not None  # the kernels serve this shape
    packed.exact = False
    turns = routings(packed, 1, top_k)
    for what in ("gated_tiling", "tiling"):
        plain = getattr(gemv, what)
        for change in SWEPT:
            with patch.object(gemv, what, lambda *a, p=plain, c=change: replace(p(*a), **c)):
                us = replayed(partial(gpu._few, packed, *found), turns)
            print(f"{name} {what} {change or 'as it is'}: {us:.1f} us", flush=True)
    with patch.object(gemv, "chained", lambda tensor: {"chain": False}):
        alone = replayed(partial(gpu._few, packed, *found), turns)
    print(f"{name} launches that do not overlap: {alone:.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b"])
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)  # the bytes that a routing hits differ by 6 %
    rate = read_rate()
    print(f"{device_name(torch.device('cuda'))}, reads {rate / 1e12:.2f} TB/s", flush=True)
    if args.sweep:
        for name in args.shapes:
            sweep(name)
        return
    columns = ("floor", *ROUTED, "half_skipped", "int4", "bf16")
    print(f"| | tokens | {' | '.join(columns)} | best | of bf16 |")
    print("|---|" + "--:|" * (len(columns) + 1) + "---|--:|")
    made = [row for name in args.shapes for row in rows(name, rate)]
    for row in made:
        times = [row.get(f"{c}_us") for c in columns]
        shown = " | ".join("" if t is None else f"{t:.1f}" for t in times)
        best = row["best"]
        share = row[f"{best}_us"] / row["bf16_us"]
        print(f"| {row['shape']} | {row['tokens']} | {shown} | {best} | {share:.2f} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
