"""Whether memory grows with layers: models of one shape and few or many layers, each compressed.

    python experiments/memory/measure.py -o RESULT.json
    python experiments/memory/measure.py --shape qwen3-30b-a3b --narrow 4 --samples 64 --length 2048

`narrow` divides the widths of a shape, so that all its layers fit a disk. Every verb runs in a fresh
process of its own. Peaks, in bytes:

    device     tensors on the GPU (torch.cuda.max_memory_allocated)
    pinned     host memory that is pinned for it
    anonymous  memory of the process that no file backs, seen every 20 ms
    resident   ru_maxrss: files that are mapped count too, as long as the system keeps their pages
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2]))
from bench.full_size import SHAPES, write_model

SMALL = {
    "model_type": "qwen3_moe", "hidden_size": 128, "moe_intermediate_size": 64,
    "intermediate_size": 256, "num_hidden_layers": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "vocab_size": 4096,
    "max_position_embeddings": 4096,
}  # fmt: skip
WIDTHS = ("hidden_size", "moe_intermediate_size", "intermediate_size", "num_attention_heads")
RUN = """
import json, resource, sys, time
import torch
import moecule
from moecule.recipe import load_recipe
from moecule.session import Compute
verb, model, out, recipe, states, changes = sys.argv[1:]
chosen, compute = load_recipe(recipe, json.loads(changes)), Compute(states=states)
start = time.perf_counter()
if verb == "calibrate":
    moecule.calibrate(model, out + "/stats", recipe=chosen, compute=compute)
else:
    plan = moecule.plan(out + "/stats", recipe=chosen)
    moecule.apply(model, plan, out, sampling=chosen.data, compute=compute)
found = {
    "seconds": round(time.perf_counter() - start, 1),
    "resident": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
}
if torch.cuda.is_available():
    found["device"] = torch.cuda.max_memory_allocated()
    found["pinned"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
print(json.dumps(found))
"""


def anonymous(pid: int) -> int:
    """Bytes of a process that no file backs; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measured(command: list[str]) -> dict[str, Any]:
    """What the process said of itself, and its anonymous memory at the peak."""
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        most, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                most[0] = max(most[0], anonymous(run.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        out, _ = run.communicate()
        done.set()
        watcher.join()
        if run.returncode:
            said.seek(0)
            raise SystemExit(said.read())
    return {**json.loads(out.splitlines()[-1]), "anonymous": most[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["small", *SHAPES], default="small")
    parser.add_argument("--narrow", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 48])
    parser.add_argument("--states", nargs="+", default=["disk", "auto"])
    parser.add_argument("--recipe", default="mc")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="windows that pass together")
    parser.add_argument("--dir", default=None, help="where the models are written")
    parser.add_argument("-o", "--out", default=None)
    args = parser.parse_args()
    shape = dict({"small": SMALL, **SHAPES}[args.shape])
    for key in WIDTHS:
        if key in shape:
            shape[key] //= args.narrow
    shape["num_key_value_heads"] = min(shape["num_key_value_heads"], shape["num_attention_heads"])
    text = {"samples": args.samples, "length": args.length, "batch": args.batch}
    changes = json.dumps({f"data.{key}": value for key, value in text.items()})
    runs = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            model = Path(scratch, "model")
            model.mkdir()
            write_model(shape, layers, model)
            for states in args.states:
                for verb in ("calibrate", "apply"):
                    given = [verb, str(model), f"{scratch}/{states}", args.recipe, states, changes]
                    seen = measured([sys.executable, "-W", "ignore", "-c", RUN, *given])
                    run = {"layers": layers, "states": states, "verb": verb, **seen}
                    runs.append(run)
                    print(json.dumps(run), flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    made = {**vars(args), "shape": shape, "device": device, "runs": runs}
    if args.out:
        Path(args.out).write_text(json.dumps(made, indent=1) + "\n")
    table(runs, args.layers)


def table(runs: list[dict[str, Any]], layers: list[int]) -> None:
    """Rows of the README's table: MB by number of layers, and MB more a layer."""
    few, many = min(layers), max(layers)
    for a in (r for r in runs if r["layers"] == few):
        (b,) = (
            r
            for r in runs
            if [r[k] for k in ("layers", "states", "verb")] == [many, a["states"], a["verb"]]
        )
        for what in ("device", "pinned", "anonymous", "resident"):
            if what in a:
                each = (b[what] - a[what]) / (many - few) / 1e6
                cells = (
                    a["states"],
                    a["verb"],
                    what,
                    f"{a[what] / 1e6:.0f}",
                    f"{b[what] / 1e6:.0f}",
                    f"{each:.2f}",
                )
                print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
