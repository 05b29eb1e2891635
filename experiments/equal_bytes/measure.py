"""Every method at equal bytes: loss and accuracy by method and budget, a line a case.

    python -m experiments.equal_bytes.measure MODEL ... --data TRAIN.jsonl.xz --text VAL/*.txt
        -o ROWS.jsonl [--jobs 12] [--samples 64] [--windows 8] [--seeds 0 1 2]
        [--only NAME ...] [--at 25% 2.5 ...]

Calibrates a model once a seed, with the sums of all methods; each case is then planned, applied to the
experts alone (all else stays at 16 bits, nothing is skipped online), written, weighed, loaded and
measured, in one of several processes. Lines that ROWS.jsonl has are not measured again, so a run that
was stopped goes on. `tables.py` makes this folder's page of it.

Removing: every recipe that drops, at 12.5, 25, 37.5 and 50 % of the experts' bytes. Rounding: every
recipe that gives bits, at 1.5 to 4 nominal bits in groups of 64. Both: dropping, then bits by `mc`, the
whole checkpoint of the bytes that so many bits an expert take on average, beside `mc` at the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import moecule
from bench.cases import FLOAT32, calibrated, windows_of, written
from moecule.ask import Ask, price
from moecule.batch import Batch
from moecule.data import Sampling
from moecule.errors import RecipeError
from moecule.hf import Streamed
from moecule.inventory import take_inventory, weigh
from moecule.measure import device_name
from moecule.recipe import Recipe, load_recipe, recipe_names
from moecule.session import load, open_checkpoint, stream
from moecule.text import calibration_batches

WINDOW, GROUP = 512, 64
SHARES = ("12.5%", "25%", "37.5%", "50%")
BITS = (1.5, 2.0, 2.5, 3.0, 4.0)
# what methods with three widths choose from: those around the mean
WIDTHS = {
    1.5: [1, 2, 3],
    2.0: [1, 2, 3],
    2.25: [1, 2, 3],
    2.5: [1, 2, 3],
    3.0: [2, 3, 4],
    4.0: [3, 4, 5],
}
PLAIN = {f"rest.{part}": 16 for part in ("attention", "shared", "dense", "router")} | {
    "group": GROUP
}
REPEATED = ("25%", 2.5)  # budgets measured for every seed
GROUPS = (
    "camera_q",
    "uniform",
)  # measured in other groups, too: equal true bytes beside other codes
MERGING = ("hc_smoe", "m_smoe", "mergemoe", "ream", "sub_moe", "uncurl")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "heapr, by layer": ("heapr", {"channels.budget": "layer"}),
    "heapr, one width": ("heapr", {"channels.budget": "expert"}),
    "heapr, in sum": ("heapr", {"channels.weigh": "tokens"}),
    "camera_p, one width": ("camera_p", {"channels.budget": "expert"}),
    "camera_p, over all layers": ("camera_p", {"channels.budget": "model"}),
    **{f"{name}, refitted": (name, {"refit": True}) for name in ("reap", "zcode", "heapr", "dern")},
    **{f"{name}, refitted": (name, {"refit": True}) for name in MERGING},
    **{f"{name}, aliased": (name, {"merge.router": "alias"}) for name in MERGING},
    **{f"dern, threshold {t:g}": ("dern", {"merge.threshold": t}) for t in (0.0, 0.25, 0.75, 1.0)},
}
# rounded after they have dropped
BOTH = ("reap", "ean", "easy_ep", "premoe", "heapr, one width", "heapr", "heapr, in sum")
MANY = ("heapr", "heapr, in sum")  # of these also when more goes
OF_MC = ("method", "bits", "error", "alpha", "beta", "floor", "budget", "clip")


@dataclass(frozen=True)
class Case:
    """A line of the result."""

    name: str
    kind: str  # remove, round, both
    budget: str | float  # the share that goes, or bits
    recipe: str
    changes: dict[str, Any]
    drop: str | None = None  # beside bits
    seed: int = 0

    @property
    def key(self) -> str:
        return json.dumps([self.kind, self.name, self.budget, self.seed])


def plain(recipe: str, changes: dict[str, Any]) -> Recipe:
    """A recipe for experts alone."""
    return dataclasses.replace(load_recipe(recipe, PLAIN | changes), skip=None)


def cases(seeds: list[int]) -> list[Case]:
    """All of the first seed, then what is repeated with the others."""
    named = {name: (name, dict[str, Any]()) for name in recipe_names()} | VARIANTS
    out = []
    for name, (recipe, changes) in named.items():
        made = load_recipe(recipe, changes)
        # zeros take as many bytes as they did, and what only skips besides is listed already
        if made.sparsify is not None or (made.drops and made.skip is not None):
            continue
        if made.drops and made.bits == 16:
            out += [Case(name, "remove", share, recipe, changes) for share in SHARES]
        elif not made.drop:
            out += [_rounded(name, recipe, changes, bits) for bits in BITS]
    # CAMERA-Q's paper speaks of 2.25 bits: as the mean of its codes, and of all that is stored
    out += [_rounded("camera_q", "camera_q", {}, 2.25)]
    for name in GROUPS:
        out += [_rounded(f"{name}, groups of {n}", name, {"group": n}, 2.0) for n in (32, 128)]
    by_mc = {f"allocate.{k}": v for k, v in load_recipe("mc").allocate.as_dict().items()}
    by_mc = {k: v for k, v in by_mc.items() if k.partition(".")[2] in OF_MC}
    out += [Case("mc alone", "both", bits, "mc", {}) for bits in BITS]
    for name in BOTH:
        recipe, changes = named[name]
        few, more = (SHARES[0], BITS), (SHARES[1], (2.0, 3.0, 4.0))
        for share, budgets in (
            zip(SHARES[:3], [BITS] * 3, strict=True) if name in MANY else (few, more)
        ):
            title = f"{name} {share}, then mc"
            out += [Case(title, "both", bits, recipe, changes | by_mc, share) for bits in budgets]
    again = [
        dataclasses.replace(c, seed=s)
        for s in seeds[1:]
        for c in out
        if c.budget in REPEATED and c.kind != "both"
    ]
    return [dataclasses.replace(c, seed=seeds[0]) for c in out] + again


def _rounded(name: str, recipe: str, changes: dict[str, Any], bits: float) -> Case:
    options = load_recipe(recipe).allocate.options
    three = len(getattr(options, "bits", ())) == 3
    own = {"allocate.bits": WIDTHS[bits]} if three else {}
    return Case(name, "round", bits, recipe, changes | own)


def budget_of(case: Case, recipe: Recipe, inventory: Any) -> Ask:
    """What is asked of the recipe."""
    if case.kind == "remove":
        return Ask(drop=str(case.budget))
    if case.kind == "round":
        return Ask(bits=float(case.budget))
    even = plain("mc", {}).even(inventory, float(case.budget))
    return Ask(size=price(inventory, even), drop=case.drop)


@torch.no_grad()
def scored(model: Any, windows: dict[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """By file and window: loss in nats a token, and share of tokens that were the likeliest."""
    out: dict[str, dict[str, list[float]]] = {}
    for name, all_its in windows.items():
        loss, hit = list[float](), list[float]()
        for part in all_its.split(8):
            logits = model(part.to(model.device), use_cache=False).logits[:, :-1].float()
            target = part[:, 1:].to(model.device)
            of = torch.nn.functional.cross_entropy(logits.mT, target, reduction="none")
            loss += [round(x, 5) for x in of.mean(1).tolist()]
            hit += [round(x, 5) for x in (logits.argmax(-1) == target).float().mean(1).tolist()]
        out[name] = {"loss": loss, "hit": hit}
    return out


@cache
def text_windows(model: str, texts: tuple[str, ...], n: int) -> dict[str, torch.Tensor]:
    """Once a process."""
    return windows_of(model, texts, WINDOW, n)


KEPT: dict[
    tuple[str, int], list[Batch]
] = {}  # of a process: to read and cut the text takes a second


def kept_batches(streamed: Streamed, data: str, samples: int, seed: int) -> list[Batch]:
    """The calibration text of a seed, once a process and model."""
    key = streamed.checkpoint.digest, seed
    if key not in KEPT:
        sampling = Sampling(samples=samples, length=WINDOW, seed=seed)
        KEPT[key] = calibration_batches(streamed, data, sampling)
    return KEPT[key]


def measured(case: Case, stats: str, args: argparse.Namespace, model: str) -> dict[str, Any] | None:
    """The case's line; None where the recipe has no such budget."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, recipe = time.perf_counter(), plain(case.recipe, case.changes)
    streamed = stream(model, FLOAT32)
    inventory = take_inventory(streamed)
    try:
        plan = moecule.plan(stats, recipe=recipe, ask=budget_of(case, recipe, inventory))
    except RecipeError as e:
        print(f"{case.name} {case.budget}: {e}", flush=True)
        return None
    batches = kept_batches(streamed, args.data, args.samples, case.seed)
    with written(streamed, plan, batches) as folder:
        weighed = weigh(open_checkpoint(folder))
        by_file = scored(load(folder, FLOAT32), text_windows(model, tuple(args.text), args.windows))
    assert sum(weighed["bytes_by_part"].values()) == price(inventory, plan)
    return {
        "model": Path(model).name,
        **{k: getattr(case, k) for k in ("kind", "name", "budget", "seed", "recipe")},
        "expert_bytes": weighed["bytes_by_part"]["experts"],
        "total_bytes": sum(weighed["bytes_by_part"].values()),
        "device": device_name(FLOAT32.torch_device()),
        "by_file": by_file,
        "seconds": round(time.perf_counter() - start, 1),
    }


def original(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """The line of the model as it is."""
    loaded, weighed = load(model, FLOAT32), weigh(open_checkpoint(model))
    return {
        "model": Path(model).name,
        "kind": "original",
        "name": "",
        "budget": "",
        "seed": 0,
        "recipe": "",
        "expert_bytes": weighed["bytes_by_part"]["experts"],
        "total_bytes": sum(weighed["bytes_by_part"].values()),
        "device": device_name(loaded.device),
        "settings": {"samples": args.samples, "windows": args.windows, "window": WINDOW},
        "by_file": scored(loaded, text_windows(model, tuple(args.text), args.windows)),
    }


def run(model: str, args: argparse.Namespace, out: Path, pool: ProcessPoolExecutor) -> list[Case]:
    """All lines of one model that `out` lacks; those that could not be made."""
    failed = list[Case]()
    had = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    mine = [row for row in had if row["model"] == Path(model).name]
    known = {json.dumps([r["kind"], r["name"], r["budget"], r["seed"]]) for r in mine}
    wanted = [c for c in cases(args.seeds) if c.key not in known]
    wanted = [c for c in wanted if args.only is None or c.name in args.only]
    wanted = [c for c in wanted if args.at is None or str(c.budget) in args.at]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, out.open("a") as lines:
        if not any(r["kind"] == "original" for r in mine):
            print(json.dumps(original(model, args)), file=lines, flush=True)
        for seed in dict.fromkeys(c.seed for c in wanted):
            folder = Path(scratch, str(seed))
            folder.mkdir()
            needing = {(c.recipe, json.dumps(c.changes)): c for c in wanted if c.seed == seed}
            recipes = [plain(c.recipe, c.changes) for c in needing.values()]
            streamed = stream(model, FLOAT32)
            batches = kept_batches(streamed, args.data, args.samples, seed)
            calibrated(streamed, batches, recipes, folder)
            print(
                f"{model}, seed {seed}: calibrated, {time.perf_counter() - start:.0f} s", flush=True
            )
            of = [c for c in wanted if c.seed == seed]
            jobs = {pool.submit(measured, c, str(folder), args, model): c for c in of}
            for job in as_completed(jobs):
                if job.exception() is not None:  # the other lines are kept; said at the end, too
                    failed.append(jobs[job])
                    print(f"{jobs[job].name}: {job.exception()!r}", flush=True)
                elif (row := job.result()) is not None:
                    print(json.dumps(row), file=lines, flush=True)
            print(f"{model}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--at", nargs="+", metavar="BUDGET")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        failed = [case for model in args.models for case in run(model, args, args.out, pool)]
    if failed:
        raise SystemExit(f"{len(failed)} cases failed: {', '.join(c.key for c in failed)}")


if __name__ == "__main__":
    main()
