"""Measure recipes on a model: loss by window at each width, paired with the original's.

    python -m experiments.mc.measure MODEL --data TRAIN.jsonl.xz --text VAL/*.txt -o RESULTS.json
        [--jobs 6] [--only NAME ...] [--windows 128]

Calibrates once on 128 windows of DATA, with every statistic that any of the recipes reads, then
plans, applies, reloads and evaluates each (recipe, bits) in a process of its own. `table.py` turns
the results into the tables of this folder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import moecule
from bench.cases import FLOAT32, windows_of, written
from moecule import online
from moecule.calibrate import collect
from moecule.data import Sampling
from moecule.inventory import take_inventory, weigh
from moecule.measure import device_name, window_losses
from moecule.methods import odp
from moecule.session import load, open_checkpoint, stream
from moecule.stats import save_layer, save_meta
from moecule.text import calibration_batches

# the widths that methods with a fixed set choose from: those around the mean
WIDTHS = {2.5: [1, 2, 3], 2.0: [1, 2, 3], 3.0: [2, 3, 4], 1.5: [1, 2, 3], 4.0: [3, 4, 5]}
ALL = [1, 2, 3, 4, 5]  # every trial is measured at all of these; a recipe reads its own columns


def cases() -> dict[str, tuple[str, dict[str, Any], float, bool]]:
    """{name: (recipe, changes, bits, measure skipping)}"""
    out: dict[str, tuple[str, dict[str, Any], float, bool]] = {}
    for bits, widths in WIDTHS.items():
        own = {"allocate.bits": widths}
        out[f"mc_paper {bits}"] = ("mc_paper", own, bits, bits == 2.5)
        out[f"mc {bits}"] = ("mc", {}, bits, bits == 2.5)
        if bits == int(bits):
            out[f"uniform_rtn {bits}"] = ("uniform_rtn", {}, bits, False)
            out[f"uniform {bits}"] = ("uniform", {}, bits, False)
        for seed in range(3):
            out[f"random-{seed} {bits}"] = ("random", {"allocate.seed": seed}, bits, False)
        for name in ("hessian", "fnorm"):
            out[f"{name} {bits}"] = (name, own, bits, False)
        for name in ("bsp", "frequency"):
            out[f"{name} {bits}"] = (name, {}, bits, False)
    whole = {"rest.attention": 16, "rest.shared": 16, "rest.dense": 16}
    for bits in (1.5, 2.0, 2.5):
        out[f"mc-experts-only {bits}"] = ("mc", whole, bits, False)
    return out


def tuning() -> dict[str, tuple[str, dict[str, Any], float, bool]]:
    """Variants of `mc`, to choose its defaults by; on train text only."""
    out: dict[str, tuple[str, dict[str, Any], float, bool]] = {}
    for bits in (2.0, 2.5, 1.5):
        for error in ("fisher", "squared"):
            for budget in ("model", "layer"):
                changes = {"allocate.error": error, "allocate.budget": budget}
                out[f"{error}-{budget} {bits}"] = ("mc", changes, bits, False)
        paper = {"allocate.alpha": 1.0, "allocate.beta": 1.5, "allocate.error": "norm"}
        out[f"paper-objective {bits}"] = ("mc", {**paper, "allocate.budget": "layer"}, bits, False)
        out[f"mc_paper {bits}"] = ("mc_paper", {}, bits, bits == 2.5)
    best = {"allocate.error": "fisher", "allocate.budget": "model"}
    out["act_order 2.0"] = ("mc", {**best, "encode.act_order": True}, 2.0, False)
    out["damp .03 2.0"] = ("mc", {**best, "encode.damp": 0.03}, 2.0, False)
    for damage in ("fisher", "hidden"):
        changes = {**best, "skip.damage": damage}
        out[f"skip-{damage} 2.5"] = ("mc", changes, 2.5, True)
    out["skip-fisher-protect0 2.5"] = (
        "mc",
        {**best, "skip.damage": "fisher", "skip.protect": 0.0},
        2.5,
        True,
    )
    return out


def measure(
    name: str, case: tuple[str, dict[str, Any], float, bool], args: argparse.Namespace, stats: Path
) -> dict[str, Any]:
    """Plan, apply, reload, evaluate; losses by file and window."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    recipe, changes, bits, skip = case
    chosen = moecule.load_recipe(recipe, changes)
    streamed, made = (
        stream(args.model, FLOAT32),
        moecule.plan(stats, recipe=chosen, ask=moecule.Ask(bits=bits)),
    )
    batches = calibration_batches(streamed, args.data, Sampling())
    with written(streamed, made, batches) as out:
        applied = time.perf_counter() - start
        model, sizes = load(out, FLOAT32), weigh(open_checkpoint(out))
        windows = windows_of(out, args.text, 512, args.windows)
        result = {
            "case": name,
            "recipe": recipe,
            "bits": bits,
            **{
                k: sizes[k]
                for k in ("size_bytes", "expert_bytes", "bits_per_weight", "nominal_bits")
            },
            "losses": {f: window_losses(model, w, args.batch).tolist() for f, w in windows.items()},
        }
        if skip:
            result["skipping"] = skipping(model, windows, args.batch)
    print(
        f"{name}: {applied:.0f} s to apply, {time.perf_counter() - start:.0f} s in all", flush=True
    )
    return result


def skipping(model: Any, windows: dict[str, torch.Tensor], batch: int) -> dict[str, Any]:
    """Losses with the saved rule, and with the same share of pairs left out by lot."""
    online.set_skip(model, True)
    ruled = {f: window_losses(model, w, batch).tolist() for f, w in windows.items()}
    run = online.experts_run(model)
    layers = [m.skip for m in model.modules() if vars(m).get("skip") is not None]
    draw = torch.Generator(device=model.device).manual_seed(0)
    for rule in layers:
        rule.__class__ = type("ByLot", (online.LayerSkip,), {"__call__": by_lot(1 - run, draw)})
    lots = {f: window_losses(model, w, batch).tolist() for f, w in windows.items()}
    return {"run": run, "losses": ruled, "by_lot": lots}


def by_lot(rate: float, draw: torch.Generator) -> Any:
    """A rule that leaves out pairs but the first by chance, in every layer alike."""

    def rule(self: Any, x: Any, idx: torch.Tensor, coef: torch.Tensor, nobody: int) -> Any:
        k = idx.shape[1]
        first = coef == coef.amax(-1, keepdim=True)
        chance = torch.rand(coef.shape, generator=draw, device=coef.device)
        run = first | (chance >= rate * k / (k - 1))
        return idx.masked_fill(~run, nobody), odp.rescaled(coef, run, self.renormalised)

    return rule


def calibrated(args: argparse.Namespace, wanted: dict[str, Any], folder: Path) -> None:
    """Statistics of all cases, trials at all widths, into `folder`."""
    recipes = []
    for recipe, changes, _, _ in wanted.values():
        wide = (
            {"allocate.bits": ALL} if "allocate.bits" in changes or recipe.startswith("mc") else {}
        )
        recipes.append(moecule.load_recipe(recipe, {**changes, **wide}))
    needs = sorted({s for r in recipes for s in r.needs()}, key=lambda s: s.name)
    streamed = stream(args.model, FLOAT32)
    batches = calibration_batches(streamed, args.data, Sampling())
    sums = dict(collect(streamed, batches, needs))
    names = {s.name for s in needs}
    for layer in sums.values():
        for name in [n for n in layer if "_b12345_" in n]:
            for lo, hi in ((1, 3), (2, 4), (3, 5)):
                part = name.replace("_b12345_", f"_b{''.join(map(str, range(lo, hi + 1)))}_")
                layer[part] = layer[name][:, lo - 1 : hi]
                names.add(part)
    meta = {
        "model": args.model,
        "digest": streamed.checkpoint.digest,
        "layers": sorted(sums),
        "statistics": sorted(names),
        "inventory": take_inventory(streamed).as_dict(),
    }
    for i, layer in sums.items():
        save_layer(layer, folder, i)
    save_meta(meta, folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--tuning", action="store_true")
    args = parser.parse_args()
    wanted = tuning() if args.tuning else cases()
    if args.only:
        wanted = {n: c for n, c in wanted.items() if any(o in n for o in args.only)}
    with tempfile.TemporaryDirectory() as scratch:
        stats, start = Path(scratch) / "stats", time.perf_counter()
        calibrated(args, wanted, stats)
        print(f"calibrated in {time.perf_counter() - start:.0f} s", flush=True)
        original = load(args.model, FLOAT32)
        windows = windows_of(args.model, args.text, 512, args.windows)
        base = {f: window_losses(original, w, args.batch).tolist() for f, w in windows.items()}
        device = device_name(original.device)
        del original
        results = []
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
            jobs = [pool.submit(measure, n, c, args, stats) for n, c in wanted.items()]
            for job in as_completed(jobs):
                results.append(job.result())
                doc = {"model": Path(args.model).name, "device": device, "original": base}
                doc["cases"] = sorted(results, key=lambda r: r["case"])
                Path(args.out).write_text(json.dumps(doc))


if __name__ == "__main__":
    main()
