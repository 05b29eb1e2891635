"""Training with what moves in host memory (`--offload`): seconds a step, memory, and the floor.

    python -m bench.offload qwen3-30b-a3b --layers 2 -o rows.json

A model of that shape and random weights, all of which move, learns random tokens, once with everything
on the GPU and once with weights, gradients and moments on the host, each in a fresh process. The floor of
a step on the host: layers come to the GPU twice, embeddings and head once, and gradients go back, at the
speed of a large pinned copy; AdamW then reads four numbers and writes three for each that moves, at that of
a copy on the host. What a killed run goes on from is saved once, after the last step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.full_size import SHAPES, write_model
from moecule.compress import peak_memory
from moecule.measure import device_name
from moecule.moe import find_layers
from moecule.session import Compute
from moecule.train.loop import train
from moecule.train.losses import next_token
from moecule.train.schedule import Schedule
from moecule.train.student import open_student, save_memory

STEPS = 6
COPIED = 1 << 30  # bytes of the copies that floors are reckoned by


def step_times(folder: str, windows: int, length: int, *, offload: bool) -> dict[str, Any]:
    """Of one way to train: seconds of the steps after the first two, and memory at the peak."""
    compute = Compute("cuda")
    student = open_student(folder, compute, offload=offload)
    save_memory(student)
    inside = sum(p.numel() for layer in find_layers(student.model)[1] for p in layer.parameters())
    device, ends = compute.torch_device(), list[float]()
    vocabulary = student.model.config.vocab_size
    lot = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (STEPS * windows, length), generator=lot)

    def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return next_token(model(input_ids=ids, use_cache=False).logits, ids)

    def tick() -> None:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())

    torch.cuda.reset_peak_memory_stats()
    done = train(
        student.model,
        loss,
        tokens,
        Schedule(steps=STEPS, batch=windows, every=STEPS, lr=1e-5, precision="bfloat16"),
        device=device,
        folder=Path(folder) / "steps",
        tick=tick,
    )
    shutil.rmtree(Path(folder) / "steps")
    return {
        "offload": offload,
        "numbers": student.trainable,
        "in_layers": inside,
        "loss": done.history[-1][1],
        "seconds": median([b - a for a, b in pairwise(ends)][1:-1]),  # the last is saved
        "bytes": peak_memory(),
    }


def bandwidths() -> dict[str, float]:
    """Bytes a second of a pinned copy to the GPU and back, and of a copy in host memory (both ways)."""
    host = torch.empty(COPIED, dtype=torch.uint8).pin_memory()
    other, there = torch.empty_like(host), torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    found = {}
    for name, to, source, moved in (
        ("to_gpu", there, host, 1), ("to_host", host, there, 1), ("in_host", other, host, 2),
    ):  # fmt: skip
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            to.copy_(source)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found[name] = moved * COPIED / min(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WHERE"))
    args = parser.parse_args()
    if args.one:
        folder, where = args.one
        found = step_times(folder, args.windows, args.length, offload=where == "host")
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(SHAPES[args.shape], args.layers, Path(folder))
        rows = []
        for where in ("device", "host"):
            command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--one", folder, where]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(said.splitlines()[-1]))
            print(rows[-1], flush=True)
    speeds = bandwidths()
    numbers, inside = rows[0]["numbers"], rows[0]["in_layers"]
    copies = 4 * ((numbers + inside) / speeds["to_gpu"] + numbers / speeds["to_host"])
    floor = copies + 28 * numbers / speeds["in_host"]
    made = {
        "device": device_name(torch.device("cuda")),
        "shape": args.shape,
        "layers": args.layers,
        "tokens": args.windows * args.length,
        "bytes_a_second": speeds,
        "floor_seconds": {"copies": copies, "host": floor},
        "rows": rows,
    }
    args.out.write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made))


if __name__ == "__main__":
    main()
