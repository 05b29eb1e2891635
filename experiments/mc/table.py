"""Tables from what `measure.py` wrote: python -m experiments.mc.table RESULTS.json ... > README.md

Added loss is in nats a token over the original, the mean of the files' means; intervals are 95 %
of the paired differences by window.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

Losses = dict[str, np.ndarray]
ROWS = (
    "uniform_rtn",
    "uniform",
    "random",
    "hessian",
    "bsp",
    "fnorm",
    "frequency",
    "mc_paper",
    "mc",
)
BITS = (1.5, 2.0, 2.5, 3.0, 4.0)
HEAD = """# MC at equal bytes: the whole table

`measure.py` makes the numbers, `table.py` this page:

    python -m experiments.mc.measure MODEL --data text/train_sample.jsonl.xz -o MODEL.json
        --text text/val/{prose,techdoc,python,c,maths,multilingual}.txt --jobs 13 --threads 1
    python -m experiments.mc.table qwen3moe-32m.json mixtral-27m.json > experiments/mc/README.md

(as one line each; the calibration text of these numbers was the first 3000 lines of the file)

Calibrated on 128 x 512 tokens of train text; loss on held-out text of six domains in windows of
512, 128 windows a domain, float32. Attention at 4 bits in every row (the last table: experts only).
Groups of 64 columns, but for `mc_paper`, which has the authors' 128 and so fewer true bits.
`random` is the mean of three draws.
"""


def losses(doc: dict[str, list[float]]) -> Losses:
    return {f: np.asarray(v) for f, v in doc.items()}


def minus(a: Losses, b: Losses) -> tuple[float, float]:
    """(mean of the files' mean differences, half width of its 95 % interval)"""
    d = {f: a[f] - b[f] for f in a}
    mean = float(np.mean([x.mean() for x in d.values()]))
    spread = np.sqrt(sum(x.var(ddof=1) / len(x) for x in d.values())) / len(d)
    return mean, float(1.96 * spread)


def mix(*parts: tuple[float, Losses]) -> Losses:
    return {f: sum(w * p[f] for w, p in parts) for f in parts[0][1]}


def say(pair: tuple[float, float], digits: int = 4) -> str:
    return f"{pair[0]:+.{digits}f} ± {pair[1]:.{digits}f}"


class Results:
    """One model's cases."""

    def __init__(self, path: str) -> None:
        doc = json.loads(Path(path).read_text())
        self.model, self.device = doc["model"], doc["device"]
        self.original = losses(doc["original"])
        self.cases: dict[str, dict[str, Any]] = {c["case"]: c for c in doc["cases"]}

    def of(self, name: str, bits: float) -> Losses | None:
        if name == "random":
            draws = [self.of(f"random-{s}", bits) for s in range(3)]
            return None if None in draws else mix(*((1 / 3, d) for d in draws if d is not None))
        case = self.cases.get(f"{name} {bits}")
        return losses(case["losses"]) if case else None

    def case(self, name: str, bits: float) -> dict[str, Any]:
        return self.cases.get(f"{name} {bits}") or self.cases[f"{name}-0 {bits}"]

    def cell(self, name: str, bits: float) -> str:
        found = self.of(name, bits)
        if found is None:
            return ""
        mean, half = minus(found, self.original)
        return f"{mean:.4f} ± {half:.4f}<br>{self.case(name, bits)['bits_per_weight']:.2f}"

    def uniform_at(self, size: float) -> Losses:
        """Uniform GPTQ at this many expert bytes, between 2 and 3 bits."""
        low, high = self.case("uniform", 2.0), self.case("uniform", 3.0)
        w = (size - low["expert_bytes"]) / (high["expert_bytes"] - low["expert_bytes"])
        return mix((1 - w, losses(low["losses"])), (w, losses(high["losses"])))


def bars(r: Results) -> list[str]:
    """The comparisons that the project holds itself to."""
    mc, out = r.of("mc", 2.5), []
    assert mc is not None
    uniform = r.uniform_at(r.case("mc", 2.5)["expert_bytes"])
    out.append(f"| mc 2.5 against uniform GPTQ at the same bytes | {say(minus(mc, uniform))} |")
    for seed in range(3):
        lot = r.of(f"random-{seed}", 2.5)
        assert lot is not None
        out.append(f"| mc 2.5 against random, draw {seed} | {say(minus(mc, lot))} |")
    for other in ("frequency", "hessian", "fnorm"):
        found = r.of(other, 2.5)
        assert found is not None
        out.append(f"| mc 2.5 against {other} | {say(minus(mc, found))} |")
    for bits in BITS:
        ours, paper = r.of("mc", bits), r.of("mc_paper", bits)
        assert ours is not None and paper is not None
        out.append(f"| mc {bits} against mc_paper {bits} | {say(minus(ours, paper))} |")
    for bits in (2.0, 3.0):
        ours, theirs = r.of("uniform", bits), r.of("uniform_rtn", bits)
        assert ours is not None and theirs is not None
        out.append(f"| GPTQ against RTN, {bits} bits, same clipping | {say(minus(ours, theirs))} |")
    return out


def skipping(r: Results) -> list[str]:
    out = []
    for name in ("mc_paper", "mc"):
        case = r.case(name, 2.5)
        found, base = case["skipping"], losses(case["losses"])
        ruled, lot = minus(losses(found["losses"]), base), minus(losses(found["by_lot"]), base)
        change = [f"{100 * (np.exp(x[0]) - 1):+.2f} % ± {100 * x[1]:.2f}" for x in (ruled, lot)]
        out.append(f"| {name} 2.5 | {100 * (1 - found['run']):.1f} % | {change[0]} | {change[1]} |")
    return out


def page(r: Results) -> str:
    lines = [f"\n## {r.model} ({r.device})\n"]
    lines += ["Added loss, nats a token, and under it the true bits a routed expert's weight.\n"]
    lines += ["| | " + " | ".join(f"{b} bits" for b in BITS) + " |", "|---|" + "--:|" * len(BITS)]
    lines += [f"| {n} | " + " | ".join(r.cell(n, b) for b in BITS) + " |" for n in ROWS]
    lines += [
        "\n| difference in loss (negative: the first is better) | nats |",
        "|---|--:|",
        *bars(r),
    ]
    lines += ["\n| online skipping | pairs left out | perplexity | the same share by lot |"]
    lines += ["|---|--:|--:|--:|", *skipping(r)]
    only = [b for b in BITS if f"mc-experts-only {b}" in r.cases]
    lines += [
        "\n| experts only (attention at 16 bits) | " + " | ".join(f"{b} bits" for b in only) + " |"
    ]
    lines += ["|---|" + "--:|" * len(only)]
    lines += ["| mc | " + " | ".join(r.cell("mc-experts-only", b) for b in only) + " |"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(HEAD + "\n".join(page(Results(path)) for path in sys.argv[1:]))
