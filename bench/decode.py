"""Decoding one sequence by whole models of full size on a GPU: tokens a second, and memory.

    python -m bench.decode [mixtral-8x7b qwen3-30b-a3b] [--layers N] [--only int8 ...] [-o RESULT.json]

Random weights made on the GPU: half of a layer's experts of 3 bits and half of 2, attention and the output
layer of 4, groups of 128, embeddings in bf16. After a prompt of 128 tokens:

- step: the model's forward through torch.compile with a static cache, captured in one CUDA graph and
  replayed; activations rounded to int8, and exact;
- generate: transformers' own `generate` with a static cache, which compiles by itself, all that it
  does for a token included.

The floor is the bytes that a token needs, all that is stored but other tokens' embeddings and the experts
not hit, at the rate at which this GPU reads a large tensor in the run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from bench.full_size import SHAPES, meta_model
from bench.kernels import fill, read_rate
from moecule import runtime
from moecule.generate import COMPILE
from moecule.measure import device_name
from moecule.moe import experts_in

GROUP, PROMPT, NEW, STEPS = 128, 128, 128, 100
WHAT = ("int8", "exact", "generate")


def random_model(name: str, layers: int | None) -> Any:
    """Compressed, of full size, with weights that keep hidden states finite."""
    model = meta_model(SHAPES[name], layers).requires_grad_(False)
    config = model.config
    config.moecule = {"model_type": config.model_type}
    n = config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts
    widths = " ".join(f"{3 - e % 2}g{GROUP}" for e in range(n))
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("self_attn" in name or name == "lm_head")
    ]
    packed = runtime.PackedConfig(
        {str(i): widths for i in range(config.num_hidden_layers)},
        dict.fromkeys(dense, f"4g{GROUP}"),
    )
    runtime.prepare_model(model, packed)
    model.to_empty(device="cuda")
    fill(model, 0.02)
    for weight in model.parameters():
        weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1.0)
    rotary = model.model.rotary_emb  # its frequencies are made where it is
    model.model.rotary_emb = type(rotary)(config).to("cuda")
    runtime.set_exact(model, False)
    return model.eval()


def bytes_of(model: Any) -> int:
    """All that a checkpoint would hold."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def bytes_needed(model: Any) -> float:
    """That a token's step reads: the experts' share that is hit, all else but the embeddings."""
    experts = [m for _, m in experts_in(model)]
    of_experts = sum(t.nbytes for m in experts for t in m.buffers())
    text = model.config.get_text_config()
    n = experts[0].num_experts
    rest = bytes_of(model) - of_experts - model.get_input_embeddings().weight.nbytes
    return rest + of_experts * text.num_experts_per_tok / n


@torch.no_grad()
def captured(
    model: Any, prompt: torch.Tensor, token: torch.Tensor, steps: int
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(a step after the prompt, what it needs to live), for what `token` [1, 1] holds, `steps` times."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + 3 + steps + 25)
    model(prompt, past_key_values=cache, use_cache=True)
    options = COMPILE.options | {"triton.cudagraphs": False}  # captured here, as one
    compiled = torch.compile(model, fullgraph=True, dynamic=False, options=options)
    position = torch.full((1, 1), PROMPT, device="cuda")

    def step() -> torch.Tensor:
        out: torch.Tensor = compiled(
            token, past_key_values=cache, position_ids=position, use_cache=True
        ).logits
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    graph.replay()
    assert torch.isfinite(logits).all()
    return graph, (cache, position, logits, compiled)


def step_seconds(model: Any, prompt: torch.Tensor) -> float:
    """Of a replayed step after the prompt."""
    graph, _kept = captured(model, prompt, prompt[:, :1].clone(), STEPS)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(STEPS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / STEPS


@torch.no_grad()
def generate_seconds(model: Any, prompt: torch.Tensor) -> float:
    """Of a token, by transformers' generate, the second time."""
    how: dict[str, Any] = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 0,
    }
    how |= {"cache_implementation": "static", "compile_config": COMPILE}
    taken = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) / (out.shape[1] - PROMPT))
    return min(taken[1:])


def measured(name: str, args: argparse.Namespace, rate: float) -> dict[str, Any]:
    """A model's row."""
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    model = random_model(name, args.layers)
    stored = bytes_of(model)
    prompt = torch.randint(0, 30000, (1, PROMPT), device="cuda")
    floor = bytes_needed(model) / rate
    row = {"shape": name, "layers": model.config.num_hidden_layers, "floor_tok_s": 1 / floor}
    row |= {"stored_bytes": stored, "made_s": time.perf_counter() - start}
    row["allocated_bytes"] = torch.cuda.memory_allocated() - before
    with torch.no_grad():
        model(prompt)
    row["after_prompt_bytes"] = torch.cuda.memory_allocated() - before
    for what in [w for w in ("int8", "exact") if w in args.only]:
        runtime.set_exact(model, what == "exact")
        torch._dynamo.reset()
        start = time.perf_counter()
        row[f"{what}_tok_s"] = 1 / step_seconds(model, prompt)
        row[f"{what}_s"] = time.perf_counter() - start
        print(json.dumps(row), flush=True)
    if "generate" in args.only:
        runtime.set_exact(model, False)
        torch._dynamo.reset()
        start = time.perf_counter()
        row["generate_tok_s"] = 1 / generate_seconds(model, prompt)
        row["generate_s"] = time.perf_counter() - start
        print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", default=["mixtral-8x7b", "qwen3-30b-a3b"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--only", nargs="+", default=WHAT, choices=WHAT)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    rate = read_rate()
    print(f"{device_name(torch.device('cuda'))}, reads {rate / 1e12:.2f} TB/s", flush=True)
    rows = [measured(name, args, rate) for name in args.shapes]
    show(rows)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print("| | floor, tok/s | step, int8 | step, exact | generate | stored, GB | allocated, GB |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        speeds = [
            f"{r[k]:.0f}" if k in r else ""
            for k in ("floor_tok_s", "int8_tok_s", "exact_tok_s", "generate_tok_s")
        ]
        sizes = [f"{r[k] / 1e9:.2f}" for k in ("stored_bytes", "after_prompt_bytes")]
        print("| " + " | ".join([r["shape"], *speeds, *sizes]) + " |", flush=True)


if __name__ == "__main__":
    main()
