"""Experts first and weights after, or weights alone: the loss at equal shares of 0.

    python -m experiments.stun.measure MODEL --data TRAIN.jsonl.xz --text VAL/*.txt -o RESULTS.json
    python -m experiments.stun.measure --tables RESULTS.json ...      this folder's README.md anew

Calibrates once a model; every row is applied, written and loaded again, and measured on the same windows.
A file that is there already is added to: only rows that it lacks are measured.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cases import FLOAT32, added, windows_of, written
from moecule.ask import Ask, decide
from moecule.calibrate import collect
from moecule.data import Sampling
from moecule.inventory import take_inventory
from moecule.measure import device_name, window_losses
from moecule.plan import Plan
from moecule.recipe import Recipe, load_recipe
from moecule.session import load, stream
from moecule.text import calibration_batches

HERE = Path(__file__).parent
WINDOW, SAMPLES, WINDOWS = 512, 32, 4
TOTALS = (0.4, 0.6)
FIRST = (0.125, 0.25)
MASK: dict[str, Any] = {
    "sparsify.method": "owl",
    "sparsify.m": 3.0,
    "mask.method": "wanda",
}
STRUCTURED: dict[str, tuple[str, dict[str, Any]]] = {
    "STUN, one threshold": ("stun", {}),
    "Z-code, over all layers": ("zcode", {**MASK, "score.budget": "model"}),
    "Z-code, over all layers; SparseGPT": (
        "zcode",
        {**MASK, "score.budget": "model", "mask.method": "sparsegpt", "sparsify.width": 0.0},
    ),
}
ALONE: dict[str, dict[str, Any]] = {
    "OWL, m = 3": {"sparsify.m": 3.0},
    "Wanda, evenly": {"sparsify.width": 0.0},
    "OWL, m = 3, SparseGPT": {"sparsify.m": 3.0, "mask.method": "sparsegpt"},
    "SparseGPT, evenly": {"sparsify.width": 0.0, "mask.method": "sparsegpt"},
}


def cases() -> dict[tuple[str, float, float], tuple[Recipe, Ask]]:
    """{(row, total, share of experts that goes first): what is asked}"""
    out = {}
    for total in TOTALS:
        for row, changes in ALONE.items():
            recipe = load_recipe("owl", {**changes, "sparsify.share": total})
            out[row, total, 0.0] = (recipe, Ask())
        for first in FIRST:
            share = 1 - (1 - total) / (1 - first)
            for row, (name, changes) in STRUCTURED.items():
                recipe = load_recipe(name, {**changes, "sparsify.share": share})
                out[row, total, first] = (recipe, Ask(drop=first))
    return out


def zeros_in(plan: Plan) -> float:
    """The share of the experts' weights that the plan removes or makes 0."""
    kept = {i: sum(str(f) != "drop" for f in of) for i, of in plan.layers.items()}
    density = plan.sparse.density if plan.sparse is not None else {}
    left = sum(n * density.get(i, 1.0) for i, n in kept.items())
    return 1 - left / sum(map(len, plan.layers.values()))


def measure(name: str, args: argparse.Namespace) -> None:
    """All rows of one model that the file lacks; it is written after each."""
    streamed = stream(name, FLOAT32)
    inventory, sampling = take_inventory(streamed), Sampling(samples=SAMPLES, length=WINDOW)
    batches, wanted = calibration_batches(streamed, args.data, sampling), cases()
    needs = dict.fromkeys(s for recipe, _ in wanted.values() for s in recipe.counted())
    stats = dict(collect(streamed, batches, [*needs]))
    windows = windows_of(name, args.text, WINDOW, WINDOWS)

    def losses(model: Any) -> dict[str, list[float]]:
        return {f: window_losses(model, w, 4).tolist() for f, w in windows.items()}

    file = Path(args.out)
    original = load(name, FLOAT32)
    doc: dict[str, Any] = {"model": Path(name).name, "device": device_name(original.device)}
    doc |= {"original": losses(original), "rows": []}
    doc = json.loads(file.read_text()) if file.is_file() else doc
    known = {(r["row"], r["total"], r["first"]) for r in doc["rows"]}
    for (row, total, first), (recipe, ask) in wanted.items():
        if (row, total, first) in known:
            continue
        start, opened = time.perf_counter(), stream(name, FLOAT32)
        made = decide(recipe, ask, stats, inventory)
        made = Plan(**{**vars(made), "digest": opened.checkpoint.digest})
        with written(opened, made, batches) as folder:
            found = losses(load(folder, FLOAT32))
        of = {"row": row, "total": total, "first": first, "zeros": zeros_in(made), "losses": found}
        doc["rows"].append(of)
        file.write_text(json.dumps(doc) + "\n")
        said = f"{row}, {first:g} of experts, {total:g}: {added(found, doc['original'])[0]:.4f}"
        print(f"{said} ({of['zeros']:.4f} gone, {time.perf_counter() - start:.0f} s)", flush=True)


def table(doc: dict[str, Any]) -> str:
    """One model's."""
    found = {(r["row"], r["first"], r["total"]): r["losses"] for r in doc["rows"]}
    rows = sorted(
        {(row, first) for row, first, _ in found},
        key=lambda at: added(found[(*at, TOTALS[0])], doc["original"])[0],
    )
    loss = np.mean([np.mean(v) for v in doc["original"].values()])
    lines = [f"## {doc['model']} (loss {loss:.4f})\n"]
    lines.append(f"| experts gone | weights | {' | '.join(f'{t:.0%} in all' for t in TOTALS)} |")
    lines.append("|---|---|" + "--:|" * len(TOTALS))
    for row, first in rows:
        cells = [added(found[row, first, t], doc["original"]) for t in TOTALS]
        way, _, mask = row.partition("; ")
        said = f"{first:.1%} by {way} | {mask or 'OWL, m = 3'}" if first else f"none | {row}"
        lines.append(f"| {said} | {' | '.join(f'{d:.3f} ± {w:.3f}' for d, w in cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, or write the tables below README.md's own words."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--text", nargs="+")
    parser.add_argument("-o", "--out", default="results.json")
    parser.add_argument("--tables", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.tables:
        page = HERE / "README.md"
        own = page.read_text().partition("\n## ")[0].rstrip()
        tables = [table(json.loads(Path(f).read_text())) for f in args.tables]
        page.write_text("\n".join([own, "", *tables]))
        return
    measure(args.model, args)


if __name__ == "__main__":
    main()
