"""A layer's routed experts on a GPU: packed, beside bf16 and what reading the bytes takes.

    python -m bench.layers [--sweep] [-o RESULT.json]

A layer of each full-size shape with random weights, half its experts of 3 bits and half of 2, groups of
128. Every time is that of one call among 16 with other tokens and another routing each, captured in one
CUDA graph and replayed. The floor is the bytes of the experts hit at the rate at which this GPU reads a
large tensor in the run. --sweep tries ways to cut the products for one token.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bench.full_size import SHAPES
from moecule import gpu, runtime
from moecule.family import load_family
from moecule.kernels import gemv
from moecule.measure import device_name
from moecule.moe import find_layers, find_moe
from moecule.packed import packed_of
from moecule.plan import Keep

TURNS = 16  # routings in turn, so that no cache holds what is read
GROUP = 128
CUTS = (  # rows, words, splits, warps
    (8, 128, 1, 1), (4, 128, 1, 1), (16, 128, 1, 1), (8, 64, 1, 1), (4, 64, 1, 1), (2, 128, 1, 1),
    (8, 256, 1, 2), (4, 256, 1, 2), (16, 256, 1, 2), (8, 512, 1, 4), (4, 512, 1, 4),
    (8, 128, 2, 1), (8, 128, 4, 1), (8, 256, 2, 2), (8, 512, 2, 4),
)  # fmt: skip
TOKENS = (1, 2, 8, 16, 64, 256, 512, 4096)
EXACT = 2  # tokens up to which the exact path is timed


def experts_module(name: str) -> Any:
    """Of the first layer, on meta."""
    settings = {**SHAPES[name], "num_hidden_layers": 1, "dtype": "bfloat16"}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    moe = find_moe(find_layers(model)[1][0], load_family(config.model_type))
    assert moe is not None  # both shapes have them in every layer
    return moe.experts


def packed_experts(name: str) -> Any:
    """Random codes; scales such that the layer's output stays finite."""
    module = experts_module(name)
    n = module.num_experts
    runtime.prepare_experts(module, [Keep(2 + e % 2, GROUP) for e in range(n)])
    module.to_empty(device="cuda")
    for key, buffer in module.named_buffers():
        if key.endswith("_codes"):
            buffer.random_(-(2**31), 2**31 - 1)
        else:
            most = 0.01 if key.endswith("_scale") else 3.0
            buffer.copy_(torch.rand_like(buffer, dtype=torch.float16).mul_(most).view(torch.int16))
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


@torch.no_grad()
def rows(name: str, rate: float) -> list[dict[str, Any]]:
    """A line for each number of tokens."""
    top_k = SHAPES[name]["num_experts_per_tok"]
    packed, made = packed_experts(name), []
    few, grouped = gpu._few, ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    found = gpu.experts_there(packed)
    assert found is not None  # the kernels serve this shape
    for tokens in TOKENS:
        turns = routings(packed, tokens, top_k)
        row = {"shape": name, "tokens": tokens, "floor_us": 1e6 * bytes_hit(packed, turns) / rate}
        made.append(row)
        turns = turns if tokens < 512 else turns[:4]
        packed.exact = False
        if tokens * top_k <= 8 * len(found[0]):
            row["codes_us"] = replayed(partial(few, packed, *found), turns)
        if tokens <= EXACT:
            packed.exact = True
            row["exact_us"] = replayed(partial(few, packed, *found), turns)
        row["grouped_us"] = replayed(partial(gpu._grouped, packed, *found), turns)
        row["unpacked_us"] = replayed(partial(gpu._unpacked, packed, *found), turns)
    del packed, found
    plain = plain_experts(name)
    for row in made:
        turns = routings(plain, row["tokens"], top_k)
        turns = turns if row["tokens"] < 512 else turns[:4]
        row["bf16_us"] = replayed(partial(grouped, plain), turns)
    return made


@torch.no_grad()
def sweep(name: str) -> None:
    """Ways to cut both products for one token, one after the other, by the time of the whole layer."""
    top_k, packed = SHAPES[name]["num_experts_per_tok"], packed_experts(name)
    found = gpu.experts_there(packed)
    assert found is not None  # the kernels serve this shape
    packed.exact = False
    turns, chosen = routings(packed, 1, top_k), dict.fromkeys(found, gemv.Tiling())
    given = [[*found, *turn] for turn in turns]
    with patch.object(gemv, "tiling", lambda of, pairs: chosen[of]):
        for what, of in zip(("gate_up", "down"), found, strict=True):
            tried = []
            for cut in itertools.starmap(gemv.Tiling, CUTS):
                if cut.splits == 1 or of.blocks >= 32 * cut.splits:
                    chosen[of] = cut
                    tried.append((replayed(partial(gpu._few, packed), given), cut))
            tried.sort(key=lambda t: t[0])
            chosen[of] = tried[0][1]
            for us, cut in tried:
                print(f"{name} {what} {us:.1f} us {cut}", flush=True)
        with patch.object(gemv, "chained", lambda tensor: {"chain": False}):
            alone = replayed(partial(gpu._few, packed), given)
        print(f"{name} without overlapping launches {alone:.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b"])
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    rate = read_rate()
    print(f"{device_name(torch.device('cuda'))}, reads {rate / 1e12:.2f} TB/s", flush=True)
    if args.sweep:
        for name in args.shapes:
            sweep(name)
        return
    print("| | tokens | floor, us | by codes, int8 | exact | grouped | unpacked first | bf16 |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    made = [row for name in args.shapes for row in rows(name, rate)]
    for row in made:
        cells = [
            row.get(f"{k}_us") for k in ("floor", "codes", "exact", "grouped", "unpacked", "bf16")
        ]
        shown = " | ".join("" if c is None else f"{c:.1f}" for c in cells)
        print(f"| {row['shape']} | {row['tokens']} | {shown} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
