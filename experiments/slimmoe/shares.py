"""How many of the steps the first of two stages is worth: held-out KL of train text at the end.

    python -m experiments.slimmoe.shares MODEL --data TRAIN.jsonl.xz [--share 0.25] [--early 0 0.1 0.2]
    python -m experiments.slimmoe.shares embedded --data moecule/assets/text/calibration.jsonl --steps 10

No text but the training text is read. `--early 0` is one shot.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from bench.cases import FLOAT32
from moecule.session import Compute, stream
from moecule.train.cut import width_of
from moecule.train.lesson import Lesson
from moecule.train.schedule import Schedule
from moecule.train.slim import slim
from moecule.train.stages import Slimming

MULTIPLE = 16  # of which the width in between is one


def main() -> None:
    """Print a line of JSON for each share of the steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--early", nargs="+", type=float, default=[0.0, 0.05, 0.1, 0.2])
    parser.add_argument("--device", default="auto")
    for name, kind, default in (
        ("share", float, 0.25), ("steps", int, 400), ("batch", int, 8), ("length", int, 256),
        ("lr", float, 1e-3), ("warmup", float, 0.02), ("every", int, 50), ("seed", int, 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    args = parser.parse_args()
    width = round(args.share * width_of(stream(args.model, FLOAT32, empty=True).model))
    schedule = Schedule(
        args.steps, args.batch, lr=args.lr, warmup=args.warmup, every=args.every, seed=args.seed
    )
    for early in args.early:
        how = {"early": early} if early else {"stages": 1}
        with tempfile.TemporaryDirectory() as scratch:
            made = slim(
                args.model, Path(scratch) / "out", Slimming(width, multiple=MULTIPLE, **how),
                lesson=Lesson(schedule=schedule, length=args.length), data=args.data,
                compute=Compute(args.device, "float32"),
            )  # fmt: skip
        kls = [
            [round(t.began or 0, 4), round(t.best or 0, 4)]
            for (t,) in (of.values() for of in made.trained)
        ]
        row = {
            "model": Path(args.model).name,
            "share": args.share,
            "steps": args.steps,
            "seed": args.seed,
        }
        print(json.dumps({**row, "early": early, "began_and_ended": kls}), flush=True)


if __name__ == "__main__":
    main()
