"""Decoding with experts in host memory and some of them cached on a GPU: tokens a second, by the cache.

    python -m bench.cache [mixtral-8x7b qwen3-30b-a3b] [--layers N] [--cache 1 0.5 0.25 0] [-o RESULT.json]

The models and the replayed step of bench.decode, activations rounded: all on the device, then with packed
experts in pinned host memory and each share of their bytes cached on the device; the cache looks every 16
steps, which is timed too. Experts are drawn by lot, the r-th of a layer with a weight of r^-SKEW (--skew);
printed are the share of uses that a layer's most used quarter of experts has, the share served from the
cache, and the floor: bytes of what is on the device at its rate, and of what is not at the rate at which
pinned memory is copied to it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.decode import PROMPT, STEPS, bytes_needed, captured, random_model
from bench.kernels import read_rate
from moecule.measure import device_name
from moecule.moe import experts_in
from moecule.offload import Offloaded, offload

SETTLE = 320  # steps in which the cache learns what is used
DRAWS = 2**14  # of experts, before they come again


class Drawn:
    """In place of a router's choice: experts drawn at random, some oftener, others in every layer.

    Random weights prefer the same few experts whatever the token is. Numbered by how often they are
    drawn, expert r has a weight of (1 + r) ** -skew. A new draw for every forward.
    """

    def __init__(self, n: int, top_k: int, skew: float, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        weight = (1.0 + torch.randperm(n, generator=g)) ** -skew
        drawn = weight.expand(DRAWS, n).multinomial(top_k, generator=g)
        self.drawn, self.turn = drawn.to("cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")

    def __call__(
        self, x: torch.Tensor, idx: torch.Tensor, coef: torch.Tensor, nobody: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `online.LayerSkip`, which may change who runs."""
        self.turn.add_(1)
        tokens = torch.arange(len(idx), device=idx.device)
        return self.drawn[(self.turn + tokens) % DRAWS], coef


def draw(model: Any, skew: float) -> None:
    """Every layer's choice of experts by lot."""
    for i, (_, module) in enumerate(experts_in(model)):
        top_k = model.config.get_text_config().num_experts_per_tok
        module.skip = Drawn(module.num_experts, top_k, skew, i)


def host_rate() -> float:
    """Bytes a second, copied from pinned memory."""
    there = torch.ones(2**28, pin_memory=True)
    here = torch.empty_like(there, device="cuda", pin_memory=False)
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        here.copy_(there, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return there.nbytes / sorted(times)[2]


def moving_seconds(
    model: Any, prompt: torch.Tensor, cache: Offloaded | None
) -> tuple[float, float]:
    """(of a step with another token each, share of uses that the most used quarter of experts has)."""
    token = prompt[:, :1].clone()
    graph, _kept = captured(model, prompt, token, SETTLE + STEPS)
    tokens = torch.randint(0, 30000, (SETTLE + STEPS, 1, 1), device="cuda")

    def run(some: torch.Tensor) -> None:
        for one in some:
            token.copy_(one)
            graph.replay()
            if cache is not None:
                cache.step()

    quarter = 0.0
    run(tokens[:SETTLE])
    if cache is not None:
        heat = cache.heat.view(len(cache.uses), -1).sort(1, descending=True).values
        quarter = float(heat[:, : heat.shape[1] // 4].sum() / heat.sum())
        cache.forget()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(tokens[SETTLE:])
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS, quarter


def cached(name: str, args: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """Rows of a model: all on the device, then for each share of the experts that the cache holds."""
    model = random_model(name, args.layers)
    draw(model, args.skew)
    prompt = torch.randint(0, 30000, (1, PROMPT), device="cuda")
    of_experts = sum(t.nbytes for _, m in experts_in(model) for t in m.buffers())
    text = model.config.get_text_config()
    hit = of_experts * text.num_experts_per_tok / experts_in(model)[0][1].num_experts
    always, bus = bytes_needed(model) - hit, host_rate()
    rows = []
    for share in [None, *args.cache]:
        torch._dynamo.reset()
        made = None
        if share is not None:  # a little more than the experts, which are padded
            room = int(share * of_experts * 1.001) + 2**20 if share else 0
            made = offload(model, torch.device("cuda"), room)
        seconds, quarter = moving_seconds(model, prompt, made)
        held = None if made is None else made.held()
        served = 1.0 if held is None else held.share
        floor = (always + served * hit) / rate + (1 - served) * hit / bus
        row = {"shape": name, "layers": text.num_hidden_layers, "cache": share}
        row |= {"tok_s": 1 / seconds, "floor_tok_s": 1 / floor, "served": served}
        row |= {"hottest_quarter": quarter, "bus_bytes_s": bus, "experts_bytes": of_experts}
        row["allocated_bytes"] = torch.cuda.memory_allocated()
        print(json.dumps(row), flush=True)
        rows.append(row)
        del made
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", default=["mixtral-8x7b", "qwen3-30b-a3b"])
    parser.add_argument("--layers", type=int)
    parser.add_argument(
        "--cache", nargs="+", type=float, metavar="SHARE", default=[1, 0.5, 0.25, 0]
    )
    parser.add_argument("--skew", type=float, default=0.8)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    rate = read_rate()
    print(f"{device_name(torch.device('cuda'))}, reads {rate / 1e12:.2f} TB/s", flush=True)
    rows = [row for name in args.shapes for row in cached(name, args, rate)]
    show(rows)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(
        "| | layers | cached | served | hottest quarter | floor, tok/s | step, int8 | allocated, GB |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        there = "all on the device" if r["cache"] is None else f"{100 * r['cache']:.0f} %"
        shares = [
            f"{100 * r[k]:.1f} %" if r["cache"] is not None else ""
            for k in ("served", "hottest_quarter")
        ]
        speeds = [f"{r[k]:.1f}" for k in ("floor_tok_s", "tok_s")]
        cells = [r["shape"], str(r["layers"]), there, *shares, *speeds]
        print("| " + " | ".join([*cells, f"{r['allocated_bytes'] / 1e9:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
