"""How long the full statistics of REAP and CAMERA take on a model of full width, with random weights.

    python -m bench.analysis qwen2-57b-a14b --layers 2 4 --data TEXT.jsonl.xz -o RESULT.json [--dir DIR]

Two models, of few and of more layers, are written to DIR first (not timed). `moecule calibrate` is timed
with each: the walk with sums of use alone, with the eight sums that all scores for dropping read (REAP's
among them), and with CAMERA's energies beside them. Scaled to all layers by the median layer.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import moecule
from bench.full_size import SHAPES, arguments, usual, write_model
from moecule.compress import peak_memory
from moecule.measure import device_name
from moecule.recipe import Recipe, load_recipe
from moecule.session import Compute


def recipes(given: dict[str, int]) -> dict[str, Recipe]:
    """By what is counted; one that both drops experts and narrows them counts for either."""
    changes = {f"data.{k}": v for k, v in given.items()}
    uniform, reap, camera = (load_recipe(n, changes) for n in ("uniform", "reap", "camera_p"))
    both = dataclasses.replace(reap, channels=camera.channels)
    return {"use": uniform, "REAP": reap, "REAP and CAMERA": both}


def timed(model: Path, out: Path, recipe: Recipe, data: str) -> dict[str, Any]:
    """Seconds of all, and of its steps."""
    marks = [time.perf_counter()]

    def clock(what: str, done: int, of: int, tokens: int) -> None:
        marks.append(time.perf_counter())

    moecule.calibrate(model, out, recipe=recipe, data=data, compute=Compute(), progress=clock)
    whole = time.perf_counter() - marks[0]
    steps = [b - a for a, b in zip(marks[1:], marks[2:], strict=False)]
    return {"seconds": whole, "steps": steps, "peak_memory": peak_memory()}


def main() -> None:
    args = arguments(16).parse_args()
    shape, device = SHAPES[args.shape], Compute().torch_device()
    known = recipes({"samples": args.samples, "length": args.length, "batch": args.batch})
    runs: dict[str, dict[int, Any]] = {name: {} for name in known}
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            model = Path(scratch, "model")
            model.mkdir()
            write_model(shape, layers, model)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            for name, recipe in known.items():
                out = Path(scratch, name)
                runs[name][layers] = timed(model, out, recipe, args.data)
                print(layers, name, runs[name][layers], flush=True)
    few, many = args.layers
    rows = {}
    for name, by in runs.items():
        each = usual(by[many]["steps"], many)
        beside = max(by[few]["seconds"] - few * each, 0.0)
        rows[name] = {
            "seconds_a_layer": each,
            "seconds_beside_layers": beside,
            "seconds_of_all_layers": beside + shape["num_hidden_layers"] * each,
        }
    doc = {
        "shape": args.shape, "layers": args.layers, "of": shape["num_hidden_layers"],
        "tokens": args.samples * args.length, "batch": args.batch,
        "device": device_name(device), "rows": rows,
    }  # fmt: skip
    print(json.dumps(doc, indent=1))
    Path(args.out).write_text(json.dumps({**doc, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
