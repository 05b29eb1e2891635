"""Calibrating on one domain: how few demonstrations EASY-EP needs, and UNCURL against dropping by use.

    python -m experiments.domains.measure MODEL ... --data TRAIN.jsonl.xz --text VAL/*.txt -o RESULTS.json
        [--jobs 6] [--many 1000] [--few 25] [--windows 64]
    python -m experiments.domains.measure --tables RESULTS.json      this folder's README.md anew

TRAIN has lines [domain, text]. The experts of each domain are chosen on windows of 512 tokens of its train
text and measured on its held-out text: for EASY-EP on `many` windows and three times on `few` of them; for
UNCURL and Z-code's use on all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cases import FLOAT32, added, by_domain, windows_of, written
from moecule.ask import Ask, decide
from moecule.calibrate import collect
from moecule.data import Sampling, sample_windows
from moecule.inventory import take_inventory
from moecule.measure import device_name, window_losses
from moecule.plan import Drop, Plan
from moecule.recipe import load_recipe
from moecule.session import load, stream, tokenizer_of

HERE = Path(__file__).parent
WINDOW, BATCH = 512, 8
SHARES = (0.25, 0.5)
DRAWS = 3  # of the few demonstrations
WHOLE = ("zcode", "uncurl")  # on all windows


def measure(model: str, domain: str, args: argparse.Namespace) -> dict[str, Any]:
    """All rows of one domain."""
    torch.set_num_threads(1)
    streamed = stream(model, FLOAT32)
    inventory, tokenizer = take_inventory(streamed), tokenizer_of(streamed.checkpoint.path)
    texts = by_domain(args.data)[domain]
    windows = sample_windows(tokenizer, texts, Sampling(samples=args.many, length=WINDOW), WINDOW)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    text = [t for t in args.text if Path(t).stem == domain]
    held_out = windows_of(model, text, WINDOW, args.windows)
    original = load(model, FLOAT32)

    def losses(of: Any) -> dict[str, list[float]]:
        return {f: window_losses(of, w, BATCH).tolist() for f, w in held_out.items()}

    whole, rows = losses(original), list[dict[str, Any]]()

    def row(name: str, draw: str, of: torch.Tensor, sums: Any, share: float) -> None:
        recipe, opened = load_recipe(name), stream(model, FLOAT32)
        plan = decide(recipe, Ask(drop=share), sums, inventory)
        plan = Plan(**{**vars(plan), "digest": opened.checkpoint.digest})
        with written(opened, plan, of.split(BATCH)) as folder:
            found = losses(load(folder, FLOAT32))
        kept = {
            i: [e for e, f in enumerate(fs) if not isinstance(f, Drop)]
            for i, fs in plan.layers.items()
        }
        added_nats, wide = added(found, whole)
        rows.append({"recipe": name, "windows": draw, "share": share, "kept": kept,
                     "added_nats": added_nats, "interval": wide})  # fmt: skip

    draws = {"many": windows}
    draws |= {f"few {k}": windows[order[k * args.few :][: args.few]] for k in range(DRAWS)}
    for draw, of in draws.items():
        names = ("easy_ep", *WHOLE) if draw == "many" else ("easy_ep",)
        needs = dict.fromkeys(s for name in names for s in load_recipe(name).counted())
        sums = dict(collect(streamed, of.split(BATCH), [*needs]))
        for name in names:
            for share in SHARES:
                row(name, draw, of, sums, share)
    loss = float(np.mean([np.mean(v) for v in whole.values()]))
    print(f"{model} {domain}: done", flush=True)
    return {"model": Path(model).name, "domain": domain, "loss": loss, "rows": rows,
            "n_windows": len(windows), "device": device_name(original.device)}  # fmt: skip


def alike(a: dict[str, list[int]], b: dict[str, list[int]]) -> float:
    """The share of the experts of `a`, over all layers, that `b` keeps, too."""
    both = sum(len({*a[i]} & {*b[i]}) for i in a)
    return both / sum(map(len, a.values()))


def tables(found: list[dict[str, Any]]) -> str:
    """All models, domain by domain."""
    first = found[0]
    lines = [(HERE / "text.md").read_text().format(device=first["device"])]
    for model in sorted({of["model"] for of in found}):
        of_model = [of for of in found if of["model"] == model]
        for share in SHARES:
            lines += [f"## {model}, {share:.0%} of the experts dropped\n"]
            lines += [
                "| domain | loss | kept alike, 25 and 1,000 | added, 1,000 | added, 25 (three draws) "
                "| loss apart | by use | UNCURL |",
                "|---|--:|--:|--:|--:|--:|--:|--:|",
            ]
            lines += [_line(of, share) for of in of_model] + [""]
    return "\n".join(lines)


def _line(of: dict[str, Any], share: float) -> str:
    rows = [r for r in of["rows"] if r["share"] == share]
    by = {(r["recipe"], r["windows"]): r for r in rows}
    many, few = by["easy_ep", "many"], [by["easy_ep", f"few {k}"] for k in range(DRAWS)]
    same = np.mean([alike(many["kept"], r["kept"]) for r in few])
    added_few = [r["added_nats"] for r in few]
    apart = (np.mean(added_few) - many["added_nats"]) / (of["loss"] + many["added_nats"])
    cells = [
        of["domain"], f"{of['loss']:.3f}", f"{same:.1%}",
        f"{many['added_nats']:.3f} ± {many['interval']:.3f}",
        " ".join(f"{a:.3f}" for a in added_few), f"{apart:+.1%}",
        *(f"{r['added_nats']:.3f} ± {r['interval']:.3f}" for r in (by[n, "many"] for n in WHOLE)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, or write the tables below text.md's words."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--data")
    parser.add_argument("--text", nargs="+")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--few", type=int, default=25)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tables", type=Path)
    args = parser.parse_args()
    if args.tables:
        (HERE / "README.md").write_text(tables(json.loads(args.tables.read_text())))
        return
    wanted = [(m, Path(t).stem) for m in args.models for t in args.text]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        jobs = [pool.submit(measure, m, d, args) for m, d in wanted]
        found = [job.result() for job in jobs]
    had = json.loads(args.out.read_text()) if args.out.is_file() else []
    args.out.write_text(json.dumps(had + found) + "\n")


if __name__ == "__main__":
    main()
