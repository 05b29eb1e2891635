"""This folder's README.md: `text.md`, and tables of what `measure.py` wrote.

python -m experiments.otp.tables [ROWS.jsonl]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import added
from experiments.otp.measure import THRESHOLDS

HERE = Path(__file__).parent
RULES = ("otp", *THRESHOLDS)
Row = Mapping[str, Any]


def losses(row: Row) -> dict[str, list[float]]:
    """By file, of each window."""
    return {f: of["loss"] for f, of in row["by_file"].items()}


def cells(row: Row, base: Row) -> tuple[float, float, float]:
    """(added loss in nats, half width of its 95 % interval, share of pairs left out)."""
    return *added(losses(row), losses(base)), row["skipped"]


def line(rows: Sequence[Row], bases: Mapping[int, Row]) -> list[str]:
    """A row of the table: all seeds of one rule."""
    found = [cells(r, bases[r["seed"]]) for r in rows]
    nats, half, skipped = (np.array(x) for x in zip(*found, strict=True))
    spread = f" (seeds' sd {nats.std(ddof=1):.4f})" if len(rows) > 1 else ""
    train = np.mean([r["train"]["skipped"] for r in rows])
    perplexity = 100 * (math.exp(nats.mean()) - 1)
    return [
        f"{100 * train:.1f} %",
        f"{100 * skipped.mean():.1f} %",
        f"{nats.mean():.4f} +- {half.mean():.4f}{spread}",
        f"{perplexity:+.2f} %",
        f"{np.mean([r['train']['kl'] for r in rows]):.4f}",
        f"{np.mean([r['seconds'] for r in rows]) / 60:.1f}",
    ]


def tables(rows: Sequence[Row]) -> str:
    """All models, one after another."""
    head = (
        "pairs to run", "rule", "left out of train text", "left out of the text measured",
        "added nats a token", "perplexity", "KL on train text", "minutes",
    )  # fmt: skip
    out = []
    for model in sorted({r["model"] for r in rows}):
        mine = [r for r in rows if r["model"] == model]
        bases = {r["seed"]: r for r in mine if r["rule"] == "none"}
        device, seeds = mine[0]["device"], len(bases)
        out += [f"\n## {model}\n", f"{seeds} seeds, {device}.\n"]
        out += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        sets = sorted({tuple(r["set"]) for r in mine})
        for keep in sorted({r["keep"] for r in mine if r["rule"] != "none"}, reverse=True):
            for rule in RULES:
                for changes in sets:
                    of = [
                        r
                        for r in mine
                        if (r["keep"], r["rule"], tuple(r["set"])) == (keep, rule, changes)
                    ]
                    if of:
                        name = " ".join([rule, *changes])
                        out.append(f"| {' | '.join([f'{keep:g}', name, *line(of, bases)])} |")
    return "\n".join(out) + "\n"


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "rows.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    (HERE / "README.md").write_text((HERE / "text.md").read_text() + tables(rows))


if __name__ == "__main__":
    main()
