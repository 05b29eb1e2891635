"""Calibration shared out over the GPUs of one host: how much faster, and whether it is the same.

    python -m bench.ranks mixtral-8x7b --layers 4 --data TEXT.jsonl.xz -o RESULT.json

A full-size shape with random weights is calibrated under torchrun with 1 process and with all. What a
layer takes is the median of the steps up plus that of the steps down, the first of each left out: they
hold what is no layer's. The floor of the time with N GPUs is the Nth part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import moecule
from bench.full_size import SHAPES, usual, write_model
from moecule.measure import device_name
from moecule.session import Compute
from moecule.stats import load_stats


def run(model: str, out: str, data: str, changes: str) -> None:
    """One of the processes: calibrate, and let the first tell when each step was done."""
    marks: list[float] = []
    compute = Compute().joined()
    moecule.calibrate(
        model,
        out,
        recipe=moecule.load_recipe("mc", json.loads(changes)),
        data=data,
        compute=compute,
        progress=lambda what, done, of, tokens: marks.append(time.perf_counter()),
    )
    if compute.ranks.is_first:
        print(json.dumps([b - a for a, b in pairwise(marks)]))


def measured(processes: int, layers: int, *given: str) -> dict[str, Any]:
    """Seconds of the whole and of a layer. Raises SystemExit where a process fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), "-m", "bench.ranks", "run", *given]
    start = time.perf_counter()
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(said.stderr[:3000])
    steps = json.loads(said.stdout.strip().splitlines()[-1])
    return {
        "command_s": time.perf_counter() - start,
        "layer_s": usual(steps, layers),
        "up_s": steps[:layers],
        "down_s": steps[layers:],
    }


def furthest(one: Path, many: Path) -> float:
    """The largest difference of two stats folders' sums, as a share of the tensor's largest."""
    a, b = (load_stats(folder)[0] for folder in (one, many))
    return max(
        float((a[i][n] - b[i][n]).abs().max() / a[i][n].abs().max().clamp(min=1e-300))
        for i in a
        for n in a[i]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="windows that pass together")
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--dir", default=None)
    parser.add_argument("-o", "--out", required=True)
    args = parser.parse_args()
    text = {"samples": args.samples, "length": args.length, "batch": args.batch}
    changes = json.dumps({f"data.{key}": value for key, value in text.items()})
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        folders = {n: Path(scratch, str(n)) for n in (1, args.processes)}
        model = Path(scratch, "model")
        model.mkdir()
        write_model(SHAPES[args.shape], args.layers, model)
        torch.cuda.empty_cache()
        runs = {
            n: measured(n, args.layers, str(model), str(out), args.data, changes)
            for n, out in folders.items()
        }
        gap = furthest(*folders.values())
    made = {
        **vars(args),
        "device": device_name(Compute().torch_device()),
        "runs": runs,
        "times_as_fast": runs[1]["layer_s"] / runs[args.processes]["layer_s"],
        "furthest_sum": gap,
    }
    Path(args.out).write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(*sys.argv[2:])
    else:
        main()
