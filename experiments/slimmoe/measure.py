"""SlimMoE in two stages, in one, and whole experts dropped: KL to the teacher at equal weights and tokens.

    python -m experiments.slimmoe.measure MODEL ... --data TRAIN.jsonl.xz --text VAL/*.txt -o rows.jsonl
    python -m experiments.slimmoe.measure --tables rows.jsonl        this folder's README.md anew
    python -m experiments.slimmoe.measure --quick                    the embedded model, seconds on a CPU

Every row leaves `--share` of the experts' weights: that share of every expert's channels, or of the
experts (by REAP). All are then distilled from the original on as many tokens, at the same rates. A row
that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cases import FLOAT32, windows_of, written
from moecule.ask import Ask, decide
from moecule.calibrate import collect
from moecule.checkpoint import Checkpoint
from moecule.inventory import take_inventory
from moecule.measure import device_name
from moecule.plan import Plan
from moecule.recipe import load_recipe
from moecule.session import ASSETS, Compute, load, stream
from moecule.text import calibration_batches
from moecule.train.cut import width_of
from moecule.train.heal import heal
from moecule.train.lesson import Lesson
from moecule.train.losses import distil
from moecule.train.schedule import Schedule, Trained
from moecule.train.slim import slim
from moecule.train.stages import Slimming

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
ARMS = {"two stages": 2, "one shot": 1, "experts dropped": 0}  # stages; 0: no slimming
SAMPLES = 64  # windows to score, or to calibrate on
TOGETHER = 8  # windows that are measured together


def lesson_of(args: argparse.Namespace, seed: int) -> Lesson:
    """The same for every arm."""
    schedule = Schedule(
        steps=args.steps, batch=args.batch, lr=args.lr, warmup=args.warmup, every=args.every, seed=seed,
        precision=args.precision,
    )  # fmt: skip
    return Lesson(schedule=schedule, length=args.length)


@contextmanager
def dropped(model: str, args: argparse.Namespace, seed: int) -> Iterator[Path]:
    """The model with that share of its experts, by REAP on text of that seed."""
    recipe = load_recipe(
        "reap", {"data.samples": args.samples, "data.length": args.length, "data.seed": seed}
    )
    streamed = stream(model, FLOAT32)
    batches, inventory = (
        calibration_batches(streamed, args.data, recipe.data),
        take_inventory(streamed),
    )
    stats = dict(collect(streamed, batches, recipe.counted()))
    made = decide(recipe, Ask(drop=1 - args.share), stats, inventory)
    opened = stream(model, FLOAT32)
    made = Plan(**{**vars(made), "digest": opened.checkpoint.digest})
    with written(opened, made, batches) as folder:
        yield folder


def make(model: str, arm: str, seed: int, out: Path, args: argparse.Namespace) -> list[Trained]:
    """The model of one row, in `out`; what its lessons gave."""
    lesson, compute = lesson_of(args, seed), Compute(args.device)
    if not ARMS[arm]:
        with dropped(model, args, seed) as source:
            done = heal(source, model, out, lesson=lesson, data=args.data, compute=compute)
        return list(done.trained.values())
    full = width_of(stream(model, FLOAT32, empty=True).model)
    asked = Slimming(
        round(args.share * full), stages=ARMS[arm], early=args.early, multiple=args.multiple,
        samples=args.samples,
    )  # fmt: skip
    found = slim(model, out, asked, lesson=lesson, data=args.data, compute=compute)
    return [trained for of in found.trained for trained in of.values()]


@torch.no_grad()
def kl_of(model: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """By file: KL(original || model), nats a token."""
    compute = Compute(args.device, "float32")
    teacher, student = load(model, compute), load(folder, compute)
    out = {}
    for name, windows in windows_of(model, args.text, args.length, args.windows).items():
        parts = windows.to(compute.torch_device()).split(TOGETHER)
        sums = [len(ids) * float(distil(student(ids).logits, teacher(ids).logits)) for ids in parts]
        out[name] = sum(sums) / len(windows)
    return out


def weights_of(folder: Path) -> dict[str, int]:
    """All numbers of the model, those of its experts, and those of the experts that a token meets."""
    streamed = stream(folder, FLOAT32, empty=True)
    moes = [moe for i in range(len(streamed.layers)) if (moe := streamed.moe(i))]
    inside = [sum(p.numel() for p in moe.experts.parameters()) for moe in moes]
    active = [n * moe.top_k // moe.experts.num_experts for n, moe in zip(inside, moes, strict=True)]
    return {
        "weights": sum(t.numel for t in Checkpoint.open(folder).stored.values()),
        "expert_weights": sum(inside),
        "active_expert_weights": sum(active),
    }


def measure(model: str, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as scratch:
        out, start = Path(scratch) / "out", time.perf_counter()
        trained = make(model, arm, seed, out, args)
        seconds = time.perf_counter() - start
        found = kl_of(model, out, args)
        return {
            "model": Path(model).name,
            "arm": arm,
            "seed": seed,
            "share": args.share,
            "early": args.early if ARMS[arm] > 1 else None,
            "steps": args.steps,
            "batch": args.batch,
            "length": args.length,
            "lr": args.lr,
            "precision": args.precision,
            **weights_of(out),
            "kl": float(np.mean(list(found.values()))),
            "kl_by_file": found,
            "held_out_kl": [[t.began, t.best] for t in trained],
            "seconds": round(seconds, 1),
            "device": device_name(Compute(args.device).torch_device()),
            "at_once": args.jobs,
        }


SAME = ("model", "arm", "seed", "share", "early", "steps", "batch", "length", "lr", "precision")


def measure_all(args: argparse.Namespace) -> None:
    """Every row that the file lacks, `--jobs` at once, each in a process of its own if several."""
    rows = [json.loads(x) for x in args.out.read_text().splitlines()] if args.out.is_file() else []
    known = {tuple(r[key] for key in SAME) for r in rows}
    every = [(m, a, s) for s in args.seeds for m in args.models for a in args.arms]
    asked = [
        (Path(m).name, a, s, args.share, args.early if ARMS[a] > 1 else None,
         *(vars(args)[key] for key in SAME[5:]))
        for m, a, s in every
    ]  # fmt: skip
    wanted = [of for of, key in zip(every, asked, strict=True) if key not in known]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda of: _row(*of, args), wanted):
            with args.out.open("a") as f:
                f.write(json.dumps(row) + "\n")
            said = {k: row[k] for k in ("model", "arm", "seed", "kl", "weights", "seconds")}
            print(json.dumps(said), flush=True)


def _row(model: str, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    if args.jobs == 1:
        return measure(model, arm, seed, args)
    options = {
        k: getattr(args, k)
        for k in ("data", "share", "early", "steps", "batch", "lr", "warmup", "every", "length", "samples",
                  "multiple", "windows", "precision", "device", "jobs")
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        model,
        "--one",
        arm,
        str(seed),
        "--text",
        *args.text,
    ]
    command += [str(x) for k, v in options.items() for x in (f"--{k}", v)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{model}, {arm}, seed {seed}:\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Of one model: arms, best first, with the mean and the spread over seeds."""
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        early = f", {row['early']:.0%} of the steps in the first" if row["early"] else ""
        by_arm.setdefault(row["arm"] + early, []).append(row)
    lines = [
        "| | KL, nats a token | seeds | weights | of a token's experts | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for arm, of in sorted(by_arm.items(), key=lambda item: np.mean([r["kl"] for r in item[1]])):
        kl = [r["kl"] for r in of]
        spread = f" ± {np.std(kl, ddof=1):.4f}" if len(kl) > 1 else ""
        millions = [of[0][key] / 1e6 for key in ("weights", "active_expert_weights")]
        lines.append(
            f"| {arm} | {np.mean(kl):.4f}{spread} | {len(kl)} | {millions[0]:.2f}M | {millions[1]:.2f}M | "
            f"{np.mean([r['seconds'] for r in of]):.0f} |"
        )
    return "\n".join(lines)


def tables(files: list[str]) -> str:
    """A table for each model and schedule."""
    rows = [json.loads(x) for f in files for x in Path(f).read_text().splitlines()]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    keys = ("model", "share", "steps", "batch", "length", "lr", "precision", "device")
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    out = []
    for of in groups.values():
        r = of[0]
        tokens = r["steps"] * r["batch"] * r["length"] / 1e6
        out.append(
            f"## {r['model']}: {r['share']:.0%} of the experts' weights, {tokens:.1f}M tokens\n\n"
            f"{r['steps']} steps of {r['batch']} windows of {r['length']}, rate {r['lr']:g}, "
            f"{r['precision']}, {r['device']}.\n\n{table(of)}\n"
        )
    return "\n".join(out)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--data")
    parser.add_argument("--text", nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=HERE / "rows.jsonl")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    for name, kind, default in (
        ("share", float, 0.25), ("early", float, 0.1), ("steps", int, 600), ("batch", int, 32),
        ("lr", float, 1e-3),
        ("warmup", float, 0.02), ("every", int, 50), ("length", int, 512), ("samples", int, SAMPLES),
        ("multiple", int, 16), ("windows", int, 32), ("jobs", int, 1), ("precision", str, "bfloat16"),
        ("device", str, "auto"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"))
    parser.add_argument("--tables", nargs="+")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure, or write the tables below README.md's own words."""
    args = parsed()
    if args.tables:
        page = HERE / "README.md"
        own = page.read_text().partition("\n## ")[0].rstrip()
        page.write_text(f"{own}\n\n{tables(args.tables)}")
        return
    if args.quick:
        args.models, args.data = ["embedded"], str(ASSETS / "text" / "calibration.jsonl")
        args.text = [str(f) for f in sorted((ASSETS / "text" / "eval").glob("*.txt"))[:2]]
        args.steps, args.batch, args.length, args.samples, args.windows = 10, 4, 64, 8, 2
        args.every, args.seeds, args.precision = 3, [0], "float32"
        if args.out == HERE / "rows.jsonl":  # those of a measurement
            args.out = Path(tempfile.gettempdir()) / "slimmoe-quick.jsonl"
    if args.one:
        arm, seed = args.one
        print(json.dumps(measure(args.models[0], arm, int(seed), args)))
        return
    if not (args.models and args.data and args.text):
        raise SystemExit("give models, --data and --text, or --quick")
    measure_all(args)


if __name__ == "__main__":
    main()
