"""Learnt masks (OTP) against thresholds (ODP) at equal measured skipping, a line a run.

    python -m experiments.otp.measure MODEL ... --data TRAIN.jsonl.xz --text VAL/*.txt -o ROWS.jsonl
        [--seeds 0 1 2] [--keeps 0.9 0.8 0.7] [--windows 64] [--jobs 6]
        [--set KEY=VALUE ...] [--quick]

A model is compressed once a seed by `mc` at 2.5 bits, without skipping. Masks then learn, once for each
share of pairs that is to run. ODP's thresholds (least damage by Fisher, with and without protected
tokens) are given the highest rate at which they leave out no more pairs of held-out train text than the
masks do, and once more of the text that is measured; what both leave out of it stands beside the loss.
Lines that ROWS.jsonl has are not measured again. `--quick` is the embedded model, its text, and a few
steps; `--set` changes the recipe mc_sharp (skip.lr=0.01) and is noted. `tables.py` makes this folder's
README.md of the lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import moecule
from bench.cases import FLOAT32, calibrated, windows_of, written
from moecule import online
from moecule.data import Sampling
from moecule.errors import RecipeError
from moecule.files import parse_json, save_whole, write_text
from moecule.learnt import first_heads
from moecule.measure import device_name, window_losses
from moecule.methods import odp
from moecule.order import save_plan
from moecule.plan import Masks, Plan, Skip
from moecule.recipe import load_recipe
from moecule.session import load, open_checkpoint, stream
from moecule.stats import load_stats
from moecule.text import calibration_batches
from moecule.train.losses import distil
from moecule.train.masks import learn_masks, learning_windows
from moecule.writer import SINGLE

BITS = 2.5
# (tokens protected, the text on which as many pairs are left out as by the masks)
THRESHOLDS = {
    "odp": (0.02, "train"),
    "odp, none protected": (0.0, "train"),
    "odp, none protected, as many here": (0.0, "text"),
}
SWEEP = 12  # halvings of the range of ODP's rate
BATCH = 16
QUICK = {"skip.steps": 8, "skip.batch": 4, "skip.samples": 48}


@dataclass(frozen=True)
class Base:
    """A compressed model without a rule, and what rules are made of."""

    folder: Path
    model: str
    plan: Plan
    stats: Mapping[int, Mapping[str, torch.Tensor]]
    sampling: Sampling
    data: str | None


def made(model: str, data: str | None, sampling: Sampling, folder: Path) -> Base:
    """Calibrated on `sampling`, at 2.5 bits."""
    recipe, stats = replace(load_recipe("mc"), data=sampling), folder / "stats"
    stats.mkdir(parents=True)
    streamed = stream(model, FLOAT32)
    batches = calibration_batches(streamed, data, sampling)
    calibrated(streamed, batches, [recipe], stats)
    plan = replace(moecule.plan(stats, recipe=recipe, ask=moecule.Ask(bits=BITS)), skip=None)
    with written(stream(model, FLOAT32), plan, batches) as whole:
        shutil.copytree(whole, folder / "base")
    return Base(folder / "base", model, plan, load_stats(stats)[0], sampling, data)


def with_rule(base: Base, rule: Skip | Masks, out: Path) -> Path:
    """The compressed model, and a rule."""
    shutil.copytree(base.folder, out)
    plan = replace(base.plan, skip=rule)
    save_plan(plan, out / "plan.yaml")
    config = parse_json((out / "config.json").read_text())
    config["quantization_config"]["skip"] = rule.settings()
    write_text(out / "config.json", json.dumps(config))
    if isinstance(rule, Masks):
        heads = first_heads(stream(base.model, FLOAT32), plan)
        save_whole({**load_file(out / SINGLE), **heads}, out / SINGLE)
    return out


@torch.no_grad()
def compared(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """With its rule: loss of each window, KL to itself without, the share of pairs left out."""
    kl, loss = 0.0, list[float]()
    for part in windows.split(BATCH):
        ids = part.to(model.device)
        online.set_skip(model, False)
        plain = model(ids, use_cache=False).logits
        online.set_skip(model, True)
        kl += len(part) * float(distil(model(ids, use_cache=False).logits, plain))
    online.set_skip(model, True)  # counts anew
    loss = window_losses(model, windows, BATCH).tolist()
    return {"loss": loss, "kl": kl / len(windows), "skipped": 1 - online.experts_run(model)}


def figures(model: Any, held: torch.Tensor, texts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Of a compressed model with a rule: on held-out train text, and on what is measured."""
    of_train, by_file = compared(model, held), {f: compared(model, w) for f, w in texts.items()}
    tokens = {f: w.numel() for f, w in texts.items()}
    skipped = sum(by_file[f]["skipped"] * n for f, n in tokens.items())
    return {
        "train": of_train,
        "by_file": by_file,
        "skipped": skipped / max(1, sum(tokens.values())),
    }


def thresholded(base: Base, out: Path) -> Any:
    """The compressed model with ODP's rule in every layer, for `left_out` to set."""
    limits = {i: (0.5,) * (of["skip_ratio"].shape[1] - 1) for i, of in base.stats.items()}
    return load(with_rule(base, Skip(limits, 0.02), out), FLOAT32, skip=True)


def left_out(model: Any, base: Base, protect: float, rate: float, held: torch.Tensor) -> float:
    """What ODP leaves out of held-out train text when asked for a rate; all where it cannot."""
    try:
        options = odp.Options(rule="damage", damage="fisher", rate=rate, protect=protect)
        limits, _ = odp.thresholds(base.stats, options)
    except RecipeError:
        return 1.0
    for module in model.modules():
        rule = vars(module).get("skip")
        if isinstance(rule, online.LayerSkip):
            rule.thresholds = limits.get(rule.index, (0.0,) * len(rule.thresholds))
            rule.protect = protect
    online.set_skip(model, True)
    window_losses(model, held, BATCH)
    return 1 - online.experts_run(model)


def odp_at(model: Any, base: Base, protect: float, skipped: float, held: torch.Tensor) -> float:
    """The highest rate at which ODP leaves out no more than that; it is what `model` then does."""
    low, high = 0.0, min(0.99, 2 * skipped + 0.05)
    for _ in range(SWEEP):
        middle = (low + high) / 2
        found = left_out(model, base, protect, middle, held)
        low, high = (middle, high) if found <= skipped else (low, middle)
    left_out(model, base, protect, low, held)
    return low


def rows(
    base: Base, seed: int, args: argparse.Namespace, had: set[str], scratch: Path
) -> Iterator[dict[str, Any]]:
    """All lines of one compressed model that are not there yet."""
    texts = windows_of(base.model, args.text, args.length, args.windows)
    common = {"model": Path(base.model).name, "seed": seed, "set": args.set}
    device = device_name(FLOAT32.torch_device())
    if key(common | {"rule": "none", "keep": 1.0}) not in had:
        plain = load(base.folder, FLOAT32)
        by_file = {f: {"loss": window_losses(plain, w, BATCH).tolist()} for f, w in texts.items()}
        yield common | {"rule": "none", "keep": 1.0, "by_file": by_file, "device": device}
    for keep in args.keeps:
        wanted = [
            r for r in ("otp", *THRESHOLDS) if key(common | {"rule": r, "keep": keep}) not in had
        ]
        if not wanted:
            continue
        changes = {**args.changes, "skip.keep": keep, "skip.seed": seed}
        part = load_recipe("mc_sharp", changes).skip
        assert part is not None  # the recipe has one
        out = with_rule(base, Masks(part.as_dict()), scratch / f"otp-{keep}")
        checkpoint = open_checkpoint(out)
        _, held = learning_windows(checkpoint, base.data, part.options, base.sampling)
        start = time.perf_counter()
        learnt = learn_masks(out, data=base.data, sampling=base.sampling, compute=FLOAT32)
        seconds = time.perf_counter() - start
        found = figures(load(out, FLOAT32), held, texts)
        about = {"keep": keep, "device": device}
        said = {"seconds": round(seconds, 1), "history": learnt.trained.history}
        yield common | about | {"rule": "otp"} | said | found
        model = thresholded(base, scratch / f"odp-{keep}")
        measured = torch.cat([*texts.values()])
        for rule, (protect, where) in THRESHOLDS.items():
            start = time.perf_counter()
            on, many = (
                (held, found["train"]["skipped"])
                if where == "train"
                else (measured, found["skipped"])
            )
            rate = odp_at(model, base, protect, many, on)
            seconds = time.perf_counter() - start
            said = {"seconds": round(seconds, 1), "rate": rate}
            yield common | about | {"rule": rule} | said | figures(model, held, texts)


def key(row: Mapping[str, Any]) -> str:
    """By which a line is known again."""
    return json.dumps([row[k] for k in ("model", "seed", "set", "rule", "keep")])


def run(model: str, seed: int, args: argparse.Namespace) -> None:
    """One model, compressed with one seed."""
    warnings.simplefilter("ignore")
    lines = args.out.read_text().splitlines() if args.out.is_file() else []
    had = {key(json.loads(line)) for line in lines}
    sampling = Sampling(args.samples, args.length, seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        base = made(model, args.data, sampling, Path(scratch))
        for row in rows(base, seed, args, had, Path(scratch)):
            if key(row) in had:
                continue
            with args.out.open("ab", buffering=0) as f:  # one write: other processes append, too
                f.write(json.dumps(row).encode() + b"\n")
            print({k: row[k] for k in ("model", "seed", "rule", "keep")}, flush=True)
            if "train" in row:
                of = row["train"]
                print(
                    f"  {100 * of['skipped']:.2f} % left out, KL {of['kl']:.5f} on train text; "
                    f"{100 * row['skipped']:.2f} % of the text measured; {row['seconds']} s",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--data")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.8])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    pairs = (item.partition("=") for item in args.set)
    args.changes = {name: json.loads(value) for name, _, value in pairs}
    if args.quick:
        args.models, args.seeds, args.keeps = ["embedded"], [0], [0.8]
        args.samples, args.windows, args.length = 16, 2, 64
        args.changes = {**QUICK, **args.changes}
        assets = Path(moecule.__file__).parent / "assets" / "text" / "eval"
        args.text = [str(p) for p in sorted(assets.glob("*.txt"))[:2]]
    if not args.models:
        parser.error("name a model, or give --quick")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        jobs = [pool.submit(run, m, seed, args) for seed in args.seeds for m in args.models]
        for job in as_completed(jobs):
            job.result()


if __name__ == "__main__":
    main()
