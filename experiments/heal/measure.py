"""What healing wins back: 2 bits by `mc`, and half of the experts gone by `reap`.

    python -m experiments.heal.measure MODEL --data TRAIN.jsonl.xz --text VAL/*.txt -o rows.jsonl
    python -m experiments.heal.measure --tables rows.jsonl ...          this folder's README.md anew

Both are made once a model and healed once a seed, by `moecule.heal` as it comes; a row that is there is not
measured again. Choices were made on held-out train text (`--set`, without --text: rows of its KL alone).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import FLOAT32, added, windows_of
from moecule.ask import Ask
from moecule.measure import device_name, window_losses
from moecule.recipe import load_recipe
from moecule.session import load
from moecule.train.heal import heal
from moecule.train.lesson import Lesson
from moecule.train.schedule import Schedule
from moecule.verbs import AUTO, apply, calibrate, plan

HERE = Path(__file__).parent
WINDOW, SAMPLES, WINDOWS = 512, 64, 32
SEEDS = (0, 1, 2)
STARTS: dict[str, tuple[str, Ask]] = {
    "mc, 2 bits": ("mc", Ask(bits=2.0)),
    "reap, half of the experts": ("reap", Ask(drop=0.5)),
}
LESSONS: dict[str, Lesson] = {
    "mc, 2 bits": Lesson(
        ("all",), Schedule(steps=1000, batch=16, lr=1e-3, every=100, precision="bfloat16")
    ),
    "reap, half of the experts": Lesson(
        ("all",), Schedule(steps=600, batch=16, lr=1e-3, every=100, precision="bfloat16")
    ),
}


def make(model: str, start: str, data: str, folder: Path, samples: int) -> Path:
    """The compressed model that is to be healed."""
    name, ask = STARTS[start]
    recipe = load_recipe(name, {"data.samples": samples})
    out = folder / Path(model).name / start.replace(" ", "-").replace(",", "")
    if not (out / "config.json").is_file():
        calibrate(model, out / "stats", recipe=recipe, data=data)
        plan(out / "stats", out / "plan.yaml", recipe=recipe, ask=ask)
        apply(model, out / "plan.yaml", out, data=data, sampling=recipe.data)
    return out


def lesson_of(start: str, seed: int, sets: Sequence[str], steps: int | None) -> Lesson:
    """What is measured, with changes to its schedule, KEY=VALUE."""
    lesson = LESSONS[start]
    changes: dict[str, Any] = {"seed": seed, **({} if steps is None else {"steps": steps})}
    for item in sets:
        key, _, value = item.partition("=")
        if key == "parts":
            lesson = replace(lesson, parts=tuple(value.split(",")))
        else:
            changes[key] = json.loads(value)
    return replace(lesson, schedule=replace(lesson.schedule, **changes))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    source = make(args.model, args.start, args.data, args.work, args.samples)
    lesson = lesson_of(args.start, args.seed, args.set, args.steps)
    said = "-".join([source.name, *args.set, str(lesson.schedule.steps), str(args.seed)])
    out = args.work / Path(args.model).name / "healed" / said.replace(",", "+")
    start = time.perf_counter()
    done = heal(source, args.model, out, lesson=lesson, data=args.data)
    seconds = time.perf_counter() - start
    (trained,) = done.trained.values()
    row = {
        "model": Path(args.model).name,
        "start": args.start,
        "seed": args.seed,
        "set": args.set,
        "parts": lesson.parts,
        "schedule": asdict(lesson.schedule),
        "device": device_name(AUTO.torch_device()),
        "at_once": args.jobs,
        "seconds": round(seconds, 1),
        "held_out_kl": [trained.began, trained.best],
        "history": trained.history,
    }
    if args.text:
        windows = windows_of(args.model, args.text, WINDOW, args.windows)
        losses = {}
        for name, folder in (("original", args.model), ("compressed", source), ("healed", out)):
            net = load(folder, FLOAT32)
            losses[name] = {f: window_losses(net, w).tolist() for f, w in windows.items()}
        cost, healed = (added(losses[n], losses["original"]) for n in ("compressed", "healed"))
        mean = np.mean([np.mean(x) for x in losses["original"].values()])
        row |= {
            "original": float(mean),
            "cost": cost,
            "healed": healed,
            "won": 1 - healed[0] / cost[0],
        }
    return row


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What says that a row is the same."""
    return (row["start"], row["seed"], *row["set"], row["schedule"]["steps"])


def run_all(args: argparse.Namespace) -> None:
    """Every row that is not there, some at once, each in a process of its own."""
    there = set()
    if args.out.is_file():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        there = {key_of(r) for r in rows if r["model"] == Path(args.model).name}
    starts = [s for s in STARTS if args.only in s]
    for start in starts:
        make(args.model, start, args.data, args.work, args.samples)
    left = [
        (start, seed)
        for seed in args.seeds
        for start in starts
        if (start, seed, *args.set, lesson_of(start, seed, args.set, args.steps).schedule.steps)
        not in there
    ]
    own = [a for a in sys.argv[1:]]
    while left:
        batch, left = left[: args.jobs], left[args.jobs :]
        started = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "experiments.heal.measure",
                    *own,
                    "--start",
                    s,
                    "--seed",
                    str(n),
                ]
            )
            for s, n in batch
        ]
        if any(p.wait() for p in started):
            raise SystemExit("a run failed")


def tables(files: Sequence[Path]) -> str:
    """The README's text."""
    rows = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    lines = [
        "| model | compressed by | loss that it cost, nats | left after healing | won back | "
        "seconds, seed by seed | KL held out of train |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for model in sorted({r["model"] for r in rows}):
        for start in STARTS:
            of = [r for r in rows if (r["model"], r["start"], r["set"]) == (model, start, [])]
            if not of:
                continue
            left, won = [r["healed"][0] for r in of], [100 * r["won"] for r in of]
            kl = np.mean([r["held_out_kl"] for r in of], axis=0)
            lines.append(
                f"| {model} | {start} | {of[0]['cost'][0]:.4f} +- {of[0]['cost'][1]:.4f} | "
                f"{np.mean(left):.4f} +- {np.std(left, ddof=1):.4f} | "
                f"{np.mean(won):.1f} +- {np.std(won, ddof=1):.1f} % | "
                f"{', '.join(str(r['seconds']) for r in of)} | {kl[0]:.3f} -> {kl[1]:.3f} |"
            )
    where = {f"{r['device']}, {r['at_once']} runs at once" for r in rows}
    return (
        (HERE / "text.md")
        .read_text()
        .format(table="\n".join(lines), device="; ".join(sorted(where)))
    )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--work", type=Path, default=Path("/tmp/heal"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", default="")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--start")
    parser.add_argument("--seed", type=int)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--tables", nargs="+", type=Path)
    args = parser.parse_args()
    if args.tables:
        (HERE / "README.md").write_text(tables(args.tables))
    elif args.start is None:
        run_all(args)
    else:
        row = json.dumps(measure(args))
        with args.out.open("a") as f:
            f.write(row + "\n")
        print(row)


if __name__ == "__main__":
    main()
