"""What training won, for moecule/measured.json: of healing, learnt masks, SlimMoE and UNCURL.

python -m experiments.trained       after any of their rows.jsonl changed; says what it read
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import added
from moecule.listing import MEASURED

HERE = Path(__file__).parent
Row = Mapping[str, Any]


def rows_of(name: str) -> list[Row]:
    """What the experiment's runs left."""
    return [json.loads(line) for line in (HERE / name / "rows.jsonl").read_text().splitlines()]


def mean(rows: Iterable[Row], value: Callable[[Row], float]) -> dict[str, float]:
    """{model: over its seeds}"""
    of: dict[str, list[float]] = {}
    for row in rows:
        of.setdefault(row["model"], []).append(value(row))
    return {model: round(float(np.mean(x)), 4) for model, x in of.items()}


def entry(recipe: str, at: str, nats: Mapping[str, float], source: str, **more: str) -> Row:
    """As listing.Measured has it."""
    return {
        "recipe": recipe,
        "at": at,
        "added_nats": nats,
        "source": f"experiments/{source}",
        **more,
    }


def healed() -> list[Row]:
    """Before and after, of two ways to compress."""
    out, rows = [], rows_of("heal")
    for recipe, start, at in (
        ("mc", "mc, 2 bits", "2 bits"),
        ("reap", "reap, half of the experts", "50% dropped"),
    ):
        these = [r for r in rows if r["start"] == start]
        out.append(entry(recipe, at, mean(these, lambda r: r["cost"][0]), "heal"))
        out.append(entry(recipe, f"{at}, healed", mean(these, lambda r: r["healed"][0]), "heal"))
    return out


def masked(keep: float = 0.8) -> list[Row]:
    """Masks and thresholds at 80 % of the pairs, over the compressed model with all of them."""
    rows = rows_of("otp")
    losses = {
        (r["model"], r["seed"], r["rule"]): {f: of["loss"] for f, of in r["by_file"].items()}
        for r in rows
        if r["keep"] in (keep, 1.0)
    }
    out = []
    for recipe, rule, method in (("mc", "odp, none protected", "odp"), ("mc_sharp", "otp", "otp")):
        these = [r for r in rows if (r["rule"], r["keep"]) == (rule, keep)]
        gone = 100 * float(np.mean([r["skipped"] for r in these]))

        def over(r: Row, rule: str = rule) -> float:
            of = (losses[r["model"], r["seed"], w] for w in (rule, "none"))
            return added(*of)[0]

        at = f"{gone:.1f}% of pairs skipped, over 2.5 bits"
        out.append(entry(recipe, at, mean(these, over), "otp", method=method))
    return out


def slim() -> list[Row]:
    """A quarter of the channels."""
    out, rows = [], rows_of("slimmoe")
    for arm in ("one shot", "two stages"):
        of = [r for r in rows if r["arm"] == arm]
        first = f" ({of[0]['early']:.0%} of the steps first)" if of[0]["early"] else ""
        nats = mean(of, lambda r: r["kl"])
        at = f"75% of the channels dropped, {arm}{first}, taught (KL)"
        out.append(entry("slim", at, nats, "slimmoe", method="slimmoe"))
    return out


def trained() -> list[Row]:
    """Half of the experts, merged or dropped, then trained."""
    rows = rows_of("zcode")

    def loss(row: Row) -> float:
        return float(np.mean([np.mean(x) for x in row["losses"].values()]))

    whole = mean((r for r in rows if r["run"] == "as given"), loss)
    out = []
    for recipe in ("uncurl", "zcode"):
        for run, at in ((recipe, "50% dropped"), (f"{recipe}, trained", "50% dropped, trained")):
            these = [r for r in rows if r["run"] == run]
            nats = mean(these, lambda r: loss(r) - whole[r["model"]])
            out.append(entry(recipe, at, nats, "zcode"))
    return out


def main() -> None:
    """Put all in place of what these experiments said before."""
    made = [*healed(), *masked(), *slim(), *trained()]
    ours = {of["source"] for of in made}
    others = [of for of in json.loads(MEASURED.read_text()) if of["source"] not in ours]
    MEASURED.write_text(json.dumps([*others, *made], indent=1) + "\n")
    for of in made:
        print(of["recipe"], of["at"], of["added_nats"])


if __name__ == "__main__":
    main()
