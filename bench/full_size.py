"""Compress models of full width, with random weights, streamed from disk: time by layer and memory.

    python -m bench.full_size mixtral-8x7b --layers 2 8 --data TEXT.jsonl.xz -o RESULT.json [--dir DIR]

A model is written to DIR first (not timed), with fewer layers than the real one where the disk is
small. Statistics with trials and gradients, the plan, GPTQ, packing, writing and the check in a fresh
process are timed by the clock. What a layer takes is the median of its steps in the second model, and
of the check what more layers added; all else, kernels compiled for the first time among it, is taken
from the first. Random weights route evenly and say nothing of quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

import moecule
from moecule.compress import peak_memory
from moecule.measure import device_name
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
    "qwen2-57b-a14b": {
        "model_type": "qwen2_moe", "hidden_size": 3584, "moe_intermediate_size": 2560,
        "intermediate_size": 18944, "shared_expert_intermediate_size": 20480,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "vocab_size": 151936, "max_position_embeddings": 32768,
    },
}  # fmt: skip


def meta_model(shape: dict[str, Any], layers: int | None = None) -> Any:
    """Of that shape in bf16, without weights; with fewer layers, if given."""
    settings = {**shape, "dtype": "bfloat16"} | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def write_model(shape: dict[str, Any], layers: int, folder: Path) -> None:
    """A checkpoint of random bf16 weights, a file a layer, made on the GPU where there is one."""
    model = meta_model(shape, layers)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    for file in (ASSETS / "model").glob("tok*"):
        shutil.copy(file, folder)
    device = Compute().torch_device()
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


def timed(folder: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each verb and of each of its steps, and bytes at the peak."""
    given = {"samples": args.samples, "length": args.length, "batch": args.batch}
    recipe = moecule.load_recipe(args.recipe, {f"data.{k}": v for k, v in given.items()})
    compute, steps = Compute(states=args.states), defaultdict(list)
    marks = [time.perf_counter()]

    def clock(what: str, done: int, of: int, tokens: int) -> None:
        steps[what].append(time.perf_counter())

    def mark() -> float:
        marks.append(time.perf_counter())
        return marks[-1] - marks[-2]

    moecule.calibrate(
        folder, out / "stats", recipe=recipe, data=args.data, compute=compute, progress=clock
    )
    seconds = {"calibrate": mark()}
    plan = moecule.plan(out / "stats", recipe=recipe, ask=moecule.Ask(bits=2.5))
    seconds["plan"] = mark()
    moecule.apply(
        folder, plan, out, data=args.data, sampling=recipe.data, compute=compute, progress=clock
    )
    seconds["apply"] = mark()
    by_step = {w: [b - a for a, b in pairwise(t)] for w, t in steps.items()}
    return {"seconds": seconds, "seconds_by_step": by_step, "peak_memory": peak_memory()}


def usual(steps: list[float], layers: int) -> float:
    """Of a layer in every pass, up or down, the median; a pass's first holds what is no layer's."""
    passes = [steps[i : i + layers] for i in range(0, len(steps), layers)]
    return sum(median(of[1:]) for of in passes)


def a_layer(runs: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Seconds that one layer more takes."""
    (a, first), (b, second) = runs.items()
    steps = second["seconds_by_step"]
    checks = [r["seconds"]["apply"] - sum(r["seconds_by_step"]["apply"]) for r in (first, second)]
    return {
        "calibrate": usual(steps["calibrate"], b),
        "apply": usual(steps["apply"], b),
        "check": (checks[1] - checks[0]) / (b - a),
    }


def arguments(batch: int) -> argparse.ArgumentParser:
    """What a bench of models of full width is told; `batch` is the default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, nargs=2, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=batch, help="windows that pass together")
    parser.add_argument("--dir", default=None)
    parser.add_argument("-o", "--out", required=True)
    return parser


def main() -> None:
    parser = arguments(8)
    parser.add_argument("--recipe", default="mc")
    parser.add_argument("--states", default="auto")
    args = parser.parse_args()
    shape, device = SHAPES[args.shape], Compute().torch_device()
    runs: dict[int, dict[str, Any]] = {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            folder = Path(scratch, "model")
            folder.mkdir()
            write_model(shape, layers, folder)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            runs[layers] = timed(folder, Path(scratch, "out"), args)
    each = a_layer(runs)
    fixed = sum(runs[args.layers[0]]["seconds"].values()) - args.layers[0] * sum(each.values())
    known = {
        "shape": args.shape, "layers": args.layers, "of": shape["num_hidden_layers"],
        "recipe": args.recipe, "tokens": args.samples * args.length, "batch": args.batch,
        "device": device_name(device), "seconds_a_layer": each, "seconds_beside_layers": fixed,
        "seconds_of_all_layers": fixed + shape["num_hidden_layers"] * sum(each.values()),
    }  # fmt: skip
    Path(args.out).write_text(json.dumps({**known, "runs": runs}, indent=1) + "\n")
    print(json.dumps(known, indent=1))
    for layers, run in runs.items():
        print(layers, "layers:", run["seconds"], run["peak_memory"])


if __name__ == "__main__":
    main()
