"""Drop experts, or channels of them, by every method and measure the loss: one table a model.

    python experiments/drop/measure.py MODEL ... --data TRAIN.jsonl.xz --text VAL/*.txt
        [--samples 64] [--windows 8] [-o RESULTS.json] [--add RESULTS.json]
    python experiments/drop/measure.py --tables RESULTS.json      this folder's README.md and
                                                                  moecule/measured.json anew

Calibrates once a model, with the sums of all methods; drops in memory what their plans drop, and
measures on windows of 512, each method on the same ones. With --add what that file has is kept, and
only cases that it lacks are measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moecule.ask import Ask, decide
from moecule.calibrate import collect
from moecule.data import Sampling, all_windows, read_texts
from moecule.inventory import take_inventory
from moecule.listing import MEASURED
from moecule.measure import device_name, window_losses
from moecule.moe import experts_of, find_layers, find_moe, put_experts, select_experts
from moecule.plan import Drop, Keep, Plan
from moecule.recipe import Recipe, load_recipe
from moecule.session import Compute, load, stream, tokenizer_of
from moecule.text import calibration_batches

HERE = Path(__file__).parent
COMPUTE = Compute(dtype="float32")
WINDOW = 512
USAGE = (
    ("never", "experts that no token reached", "{}"),
    ("least_half", "share of the pairs that the half used least serves", "{:.3f}"),
    ("rank_correlation", "rank correlation of count and mean length", "{:.2f}"),
)
SHARES = ("12.5%", "25%", "37.5%", "50%")
HEAD = """# Dropping experts: every method, the same shares

    python experiments/drop/measure.py {models} --data text/train_sample.jsonl.xz
        --text text/val/{{prose,techdoc,python,c,maths,multilingual}}.txt -o experiments/drop/results.json
    python experiments/drop/measure.py --tables experiments/drop/results.json

(the first as one line.) Calibrated on {samples} windows of {window} tokens of train text, once for all
methods; loss on held-out text of six domains, {windows} windows of {window} each, float32, {device}.
Added loss in nats a token over the original, the mean of the domains' means, with the 95 % interval
of the paired differences by window. Rows are in the order of the loss at 25 %. "over all layers":
experts of all layers are ranked together. `unified 0, 1, 1` is REAP's sum without the division by the
count. `zcode_random` is the mean of three draws. The rows of `premoe`, the cheapest, which reads the
router alone, were added by the same functions later; the original and `seer` came out the same again.

The papers of REAP, MAN and MSAN find means over an expert's tokens better than sums. Here sums are
better, but for REAP up to 25 % on mixtral-27m; MAN and MSAN lose more than lots do on mixtral-27m, and
on qwen3moe-32m at 50 %. These two models use their experts unevenly (last table), and a mean does not
see how often an expert is used: it keeps rare ones with long outputs and drops busy ones. (Whether the
papers' models use theirs more evenly was not looked at.) One calibration, few windows: differences
within the intervals are not differences. It took 20 minutes, and 13 more for the channels (--add; 152 and
66 s of them to calibrate, with gradients), on one of two cores that others used too.

`heapr` and `camera_p` drop channels of experts, the same share of the experts' bytes ("one width": as
many of every expert). **Does HEAPr beat dropping whole experts at 20 to 40 %?** At 25 % it does, on
both models; at 37.5 % on mixtral-27m, while on qwen3moe-32m it loses as much as the best row of whole
experts. At 50 % it loses as much on mixtral-27m and more on qwen3moe-32m. (Each model's second table;
every column is against the row of whole experts that is best in it. 20, 30 and 40 % of 8 experts are no
whole number.) Again sums over tokens beat means: "in sum" (`channels.weigh=tokens`, ours) is HEAPr's
score times the number of the expert's tokens, and loses less than the best of whole experts on both
models from 25 % on. CAMERA-P, a sum too, does so but for 25 and 37.5 % on qwen3moe-32m, where it loses
as much. All layers ranked together lose less than each by itself, but for CAMERA-P at 50 %. One width
cannot take more from idle experts than from busy ones: at 25 % it loses 7 to 60 times what many widths
do, and more than most rows of whole experts. For a checkpoint that stock transformers loads, dropping
whole experts was the better way here.
"""
CHANNELS = ("heapr", "heapr, in sum", "heapr, by layer", "camera_p", "camera_p, over all layers")


def cases() -> dict[str, tuple[Recipe, ...]]:
    """{row: recipes, whose losses are averaged}"""
    plain = ("reap", "ean", "man", "msan", "seer", "zcode", "easy_ep", "premoe", "premoe_tcess")
    out = {name: (load_recipe(name),) for name in plain}
    weighted = {"score.alpha": 1, "score.gamma": 1, "score.mean": False}
    out["unified 0, 1, 1"] = (load_recipe("man", weighted),)
    for name in ("seer", "zcode"):
        out[f"{name}, over all layers"] = (load_recipe(name, {"score.budget": "model"}),)
    draws = (load_recipe("zcode_random", {"score.seed": seed}) for seed in range(3))
    out["zcode_random"] = tuple(draws)
    for name in ("heapr", "camera_p"):
        out[name] = (load_recipe(name),)
        other = ("layer", "by layer") if name == "heapr" else ("model", "over all layers")
        for budget, said in (other, ("expert", "one width")):
            out[f"{name}, {said}"] = (load_recipe(name, {"channels.budget": budget}),)
    out["heapr, in sum"] = (load_recipe("heapr", {"channels.weigh": "tokens"}),)
    return out


def usage(stats: dict[int, Any]) -> list[dict[str, float]]:
    """By layer: what the half used least serves of all pairs, and how mean lengths go with counts."""
    out = []
    for _, sums in sorted(stats.items()):
        count, mean = sums["count"], sums["norm"] / sums["count"].clamp(min=1)
        ranks = torch.stack([t.argsort().argsort().double() for t in (count, mean)])
        out.append(
            {
                "never": int((count == 0).sum()),
                "least_half": float(count.sort().values[: len(count) // 2].sum() / count.sum()),
                "rank_correlation": float(torch.corrcoef(ranks)[0, 1]),
            }
        )
    return out


def pruned(model: Any, family: Any, plan: Plan) -> Any:
    """A copy without the experts that the plan drops; what `apply` writes is the same.

    Channels that go are multiplied by 0 here.
    """
    model = copy.deepcopy(model)
    layers = find_layers(model)[1]
    for i, fates in plan.layers.items():
        moe = find_moe(layers[i], family)
        assert moe is not None
        down = experts_of(moe.experts).down
        for e, fate in enumerate(fates):
            if isinstance(fate, Keep) and fate.channels is not None:
                down[e][:, plan.order[i][e][fate.channels :].long()] = 0
        kept = [e for e, fate in enumerate(fates) if fate != Drop()]
        put_experts(moe.experts, experts_of(moe.experts).select(kept))
        select_experts(moe, kept, len(fates))
    return model


def measure(
    name: str, args: argparse.Namespace, had: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All rows of one model; those that it had are not measured again."""
    known_cases = {row["case"] for row in had["rows"]} if had else set()
    start = time.perf_counter()
    wanted = {case: recipes for case, recipes in cases().items() if case not in known_cases}
    streamed = stream(name, COMPUTE)
    family, inventory = streamed.family, take_inventory(streamed)
    sampling = Sampling(samples=args.samples, length=WINDOW)
    needs = {s: None for recipes in wanted.values() for r in recipes for s in r.counted()}
    stats = dict(collect(streamed, calibration_batches(streamed, args.data, sampling), [*needs]))
    print(f"{name}: calibrated in {time.perf_counter() - start:.0f} s", flush=True)
    model, tokenizer = load(name, COMPUTE), tokenizer_of(streamed.checkpoint.path)
    windows = {
        Path(t).stem: all_windows(tokenizer, read_texts(t), WINDOW)[: args.windows]
        for t in args.text
    }
    known: dict[str, dict[str, list[float]]] = {}

    def losses(plan: Plan) -> dict[str, list[float]]:
        fates = [[str(f) for f in layer] for _, layer in sorted(plan.layers.items())]
        key = json.dumps([plan.channels, fates])
        if key not in known:
            left = pruned(model, family, plan)
            known[key] = {f: window_losses(left, w, 4).tolist() for f, w in windows.items()}
        return known[key]

    rows = []
    for row, recipes in wanted.items():
        for share in SHARES:
            plans = [decide(r, Ask(drop=share), stats, inventory) for r in recipes]
            of = [losses(plan) for plan in plans]
            mean = {f: np.mean([d[f] for d in of], axis=0).tolist() for f in windows}
            rows.append({"case": row, "share": share, "losses": mean})
        print(f"{row}: {time.perf_counter() - start:.0f} s", flush=True)
    original = losses(inventory.untouched())
    if had is not None:
        pairs = [zip(original[f], had["original"][f], strict=True) for f in windows]
        wide = max(abs(a - b) for of in pairs for a, b in of)
        assert wide < 1e-4, f"{name} was measured on other windows, or is another model: {wide}"
        return {**had, "rows": [*had["rows"], *rows]}
    return {
        "model": Path(name).name,
        "device": device_name(model.device),
        "usage": usage(stats),
        "original": original,
        "rows": rows,
    }


def added(losses: dict[str, list[float]], original: dict[str, list[float]]) -> tuple[float, float]:
    """(mean of the files' mean differences, half width of its 95 % interval)"""
    d = [np.asarray(losses[f]) - np.asarray(original[f]) for f in original]
    spread = np.sqrt(sum(x.var(ddof=1) / len(x) for x in d)) / len(d)
    return float(np.mean([x.mean() for x in d])), float(1.96 * spread)


def tables(doc: dict[str, Any]) -> str:
    """The page."""
    names = " ".join(m["model"] for m in doc["models"])
    first = doc["models"][0]["device"]
    lines = [HEAD.format(models=names, device=first, window=WINDOW, **doc["settings"])]
    for m in doc["models"]:
        loss = np.mean([np.mean(v) for v in m["original"].values()])
        lines += [f"## {m['model']} (loss {loss:.4f})\n", f"| | {' | '.join(SHARES)} |"]
        lines.append("|---|" + "--:|" * len(SHARES))
        found = {(r["case"], r["share"]): added(r["losses"], m["original"]) for r in m["rows"]}
        for case in sorted(dict.fromkeys(c for c, _ in found), key=lambda c: found[c, "25%"]):
            cells = [f"{found[case, s][0]:.3f} ± {found[case, s][1]:.3f}" for s in SHARES]
            lines.append(f"| {case} | {' | '.join(cells)} |")
        lines += ["", *against_whole(m), ""]
    lines += ["## How evenly experts are used\n", "By layer, from the calibration text.\n"]
    for m in doc["models"]:
        lines += [f"| {m['model']} |{'|'.join(f' {i} ' for i in range(len(m['usage'])))}|"]
        lines.append("|---|" + "--:|" * len(m["usage"]))
        for key, what, form in USAGE:
            lines.append(f"| {what} | {' | '.join(form.format(u[key]) for u in m['usage'])} |")
        lines.append("")
    return "\n".join(lines)


def against_whole(m: dict[str, Any]) -> list[str]:
    """A table: what channels lose beyond the best row of whole experts, at the same share."""
    of = {(r["case"], r["share"]): r["losses"] for r in m["rows"]}
    names = [
        case for case in dict.fromkeys(c for c, _ in of) if case.partition(",")[0] not in CHANNELS
    ]
    best = {s: min(names, key=lambda c: added(of[c, s], m["original"])[0]) for s in SHARES}
    lines = [f"| beyond the best of whole experts | {' | '.join(best[s] for s in SHARES)} |"]
    lines.append("|---|" + "--:|" * len(SHARES))
    for case in CHANNELS:
        found = [added(of[case, s], of[best[s], s]) for s in SHARES]
        lines.append(f"| {case} | {' | '.join(f'{d:+.3f} ± {w:.3f}' for d, w in found)} |")
    return lines


def measured(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """For moecule/measured.json: the packaged recipes at 25 %."""
    out = []
    for name in [n for n in cases() if "," not in n]:
        nats = {}
        for m in doc["models"]:
            (row,) = [r for r in m["rows"] if (r["case"], r["share"]) == (name, "25%")]
            nats[m["model"]] = round(added(row["losses"], m["original"])[0], 3)
        source = "experiments/drop"
        out.append({"recipe": name, "at": "25% dropped", "added_nats": nats, "source": source})
    return out


def main() -> None:
    """Measure, or write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--data")
    parser.add_argument("--text", nargs="+")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("-o", "--out", default="results.json")
    parser.add_argument("--add")
    parser.add_argument("--tables")
    args = parser.parse_args()
    if args.tables:
        doc = json.loads(Path(args.tables).read_text())
        (HERE / "README.md").write_text(tables(doc))
        others = [c for c in json.loads(MEASURED.read_text()) if c["source"] != "experiments/drop"]
        MEASURED.write_text(json.dumps(measured(doc) + others, indent=1) + "\n")
        return
    settings = {"samples": args.samples, "windows": args.windows}
    before = (
        json.loads(Path(args.add).read_text()) if args.add else {"settings": settings, "models": []}
    )
    assert before["settings"] == settings, "the file that is added to has other settings"
    had = {m["model"]: m for m in before["models"]}
    found = [measure(name, args, had.get(Path(name).name)) for name in args.models]
    doc = {"settings": settings, "models": found}
    Path(args.out).write_text(json.dumps(doc) + "\n")


if __name__ == "__main__":
    main()
