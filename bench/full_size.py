"""Compress a model of full width, with random weights, streamed from disk: time and memory by layer.

    python bench/full_size.py mixtral-8x7b --layers 8 --data TEXT.jsonl.xz -o RESULT.json [--dir DIR]

The model is written to DIR first (not timed), with fewer layers than the real one where the disk is
small; what a layer takes is then scaled to all of them, and what does not depend on layers is added
once. The whole of `moecule compress` runs: statistics with trials and gradients, the plan, GPTQ,
packing, the check in a fresh process, evaluation. Random weights route evenly and say nothing of
quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

import moecule
from moecule.compress import compress, peak_memory
from moecule.session import ASSETS, Compute

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        "max_position_embeddings": 32768,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768,
        "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
}  # fmt: skip


def write_model(shape: dict[str, Any], layers: int, folder: Path) -> None:
    """A checkpoint of random bf16 weights, a file a layer, made on the GPU where there is one."""
    settings = {**shape, "num_hidden_layers": layers, "dtype": "bfloat16"}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    for file in (ASSETS / "model").glob("tok*"):
        shutil.copy(file, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw = torch.Generator(device=device).manual_seed(0)
    by_file: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, place in model.state_dict().items():
        parts = name.split(".")
        by_file[f"layer-{int(parts[2]):04d}" if parts[1] == "layers" else "outer"][name] = place
    weight_map = {}
    for part, places in by_file.items():
        tensors = {}
        for name, place in places.items():
            value = torch.empty(place.shape, dtype=torch.bfloat16, device=device)
            value.fill_(1.0) if place.dim() == 1 else value.normal_(0, 0.02, generator=draw)
            tensors[name] = value
        saved = {
            n: t.cpu().contiguous() for n, t in revert_weight_conversion(model, tensors).items()
        }
        save_file(saved, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(saved, f"model-{part}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Clock:
    """When each step of each verb was done."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    def __call__(self, what: str, done: int, of: int) -> None:
        self.times[what].append(time.perf_counter())

    def by_layer(self) -> dict[str, list[float]]:
        """Seconds of each step, the first not counted: it starts with what is no layer's."""
        return {w: [b - a for a, b in zip(t, t[1:], strict=False)] for w, t in self.times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="windows that pass together")
    parser.add_argument("--recipe", default="mc")
    parser.add_argument("--states", default="auto")
    parser.add_argument("--experts", type=int, help="fewer, so that more layers fit the disk")
    parser.add_argument("--dir", default=None)
    parser.add_argument("-o", "--out", required=True)
    args = parser.parse_args()
    shape = dict(SHAPES[args.shape])
    for key in ("num_experts", "num_local_experts"):
        if args.experts and key in shape:
            shape[key] = args.experts
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        folder = Path(scratch, "model")
        folder.mkdir()
        start = time.perf_counter()
        write_model(shape, args.layers, folder)
        print(f"model written in {time.perf_counter() - start:.0f} s", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        clock = Clock()
        changes = {"samples": args.samples, "length": args.length, "batch": args.batch}
        changes = {f"data.{key}": value for key, value in changes.items()}
        start = time.perf_counter()
        made = compress(
            folder,
            Path(scratch, "out"),
            recipe=moecule.load_recipe(args.recipe, changes),
            ask=moecule.Ask(bits=2.5),
            data=args.data,
            compute=Compute(states=args.states),
            progress=clock,
        )
        total = time.perf_counter() - start
        steps = clock.by_layer()
        layers = {w: sum(s) for w, s in steps.items()}
        rest = total - sum(layers.values())
        scale = shape["num_hidden_layers"] / args.layers
        result = {
            "shape": args.shape, "layers": args.layers, "of": shape["num_hidden_layers"],
            "recipe": args.recipe, "tokens": args.samples * args.length,
            "device": made.after.device, "seconds": total,
            "seconds_by_verb": dict(made.after.seconds), "seconds_by_step": steps,
            "seconds_beside_layers": rest,
            "scaled_seconds": rest + scale * sum(layers.values()),
            "scaled_without_evaluation": rest
            + scale * sum(s for w, s in layers.items() if w != "evaluate"),
            "peak_memory": peak_memory(), "size_bytes": made.after.size_bytes,
        }  # fmt: skip
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    result.pop("seconds_by_step")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
