"""This folder's page, its plots and moecule/measured.json, from what `measure.py` wrote.

    python -m experiments.equal_bytes.tables

The plots need matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import cases
from experiments.equal_bytes.measure import BITS, REPEATED, SHARES
from moecule.listing import MEASURED

HERE = Path(__file__).parent
LEVELS = (0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.5, 0.625, 0.75, 0.875)  # of the experts' bytes
KINDS = {"remove": "removing", "round": "rounding", "both": "removing, then rounding"}
COMPOSED = ("heapr, in sum 25%, then mc", "heapr_mc")  # the case that the packaged recipe is
Row = Mapping[str, Any]


def added(row: Row, whole: Row) -> tuple[float, float]:
    """(added loss in nats a token, the mean of the files' means; half width of its 95 % interval)"""
    losses = ({f: of["loss"] for f, of in r["by_file"].items()} for r in (row, whole))
    return cases.added(*losses)


def hit(row: Row) -> float:
    """Share of tokens that were the likeliest, the mean of the files' means."""
    return float(np.mean([np.mean(of["hit"]) for of in row["by_file"].values()]))


class Model:
    """All lines of one model."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        (self.whole,) = (r for r in self.rows if r["kind"] == "original")

    def of(self, kind: str, name: str, budget: object) -> list[Row]:
        """Of every seed, the first seed first."""
        found = [
            r for r in self.rows if (r["kind"], r["name"], r["budget"]) == (kind, name, budget)
        ]
        return sorted(found, key=lambda r: r["seed"])

    def names(self, kind: str, budget: object) -> list[str]:
        """Those measured at the budget, the least loss first; then the others."""
        all_its = dict.fromkeys(r["name"] for r in self.rows if r["kind"] == kind)
        first = {n: of[0] for n in all_its if (of := self.of(kind, n, budget))}
        ranked = sorted(first, key=lambda n: added(first[n], self.whole)[0])
        return ranked + sorted(set(all_its) - set(ranked))

    def cell(self, kind: str, name: str, budget: object) -> str:
        found = self.of(kind, name, budget)
        if not found:
            return ""
        nats, wide = added(found[0], self.whole)
        return f"{nats:.3f} ± {wide:.3f}"

    def again(self, kind: str, name: str, budget: object) -> tuple[str, str]:
        """(mean and standard deviation of the seeds, accuracy lost in points)"""
        found = self.of(kind, name, budget)
        if not found:
            return "", ""
        nats = [added(r, self.whole)[0] for r in found]
        lost = 100 * (hit(self.whole) - np.mean([hit(r) for r in found]))
        spread = f", {np.std(nats, ddof=1):.3f}" if len(nats) > 1 else ""
        return f"{np.mean(nats):.3f}{spread}", f"{lost:.1f}"


def table(model: Model, kind: str, budgets: Sequence[object], middle: object) -> list[str]:
    """One kind's rows, by the loss at `middle`."""
    repeated = middle in REPEATED
    head = [b if isinstance(b, str) else f"{b:g} bits" for b in budgets]
    more = (
        [f"{middle}: 3 seeds, sd".replace("2.5:", "2.5 bits:"), "points lost"] if repeated else []
    )
    lines = [f"| | {' | '.join([*head, *more])} |", "|---|" + "--:|" * (len(head) + len(more))]
    for name in model.names(kind, middle):
        cells = [model.cell(kind, name, b) for b in budgets]
        cells += model.again(kind, name, middle) if repeated else ()
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ranges = []
    for b in budgets:
        sizes = [
            r["expert_bytes"] / 1e6 for r in model.rows if (r["kind"], r["budget"]) == (kind, b)
        ]
        low, high = (f"{f(sizes):.2f}" if sizes else "" for f in (min, max))
        ranges.append(low if low == high else f"{low} to {high}")
    return [*lines, f"| *experts, MB* | {' | '.join([*ranges, *([''] * len(more))])} |", ""]


def best(model: Model) -> list[str]:
    """What loses least within a share of the experts' bytes, of each kind."""
    lines = [f"| experts' bytes | {' | '.join(KINDS.values())} |", "|--:|---|---|---|"]
    full = model.whole["expert_bytes"]
    for level in LEVELS:
        cells = []
        for kind in KINDS:
            able = [r for r in model.rows if r["kind"] == kind and r["seed"] == 0]
            able = [r for r in able if r["expert_bytes"] <= level * full * 1.0005]
            least = min(able, key=lambda r: added(r, model.whole)[0], default=None)
            if least is None:
                cells.append("")
                continue
            at = least["budget"] if kind == "remove" else f"{least['budget']:g} bits"
            cells.append(f"{least['name']} {at}: {added(least, model.whole)[0]:.3f}")
        lines.append(f"| {100 * level:g} % | {' | '.join(cells)} |")
    return [*lines, ""]


def plot(model: Model, to: Path) -> None:
    """Added loss against the checkpoint's bytes, and the front that nothing is better than."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "moecule", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    points = []
    for (kind, said), marker, colour in zip(
        KINDS.items(), "os^", ("#d55e00", "#0072b2", "#009e73"), strict=True
    ):
        its = [r for r in model.rows if r["kind"] == kind and r["seed"] == 0]
        at = [(r["total_bytes"] / 1e6, max(added(r, model.whole)[0], 1e-3)) for r in its]
        axes.scatter(
            *zip(*at, strict=True), s=14, marker=marker, label=said, color=colour, alpha=0.7
        )
        points += [(*p, r) for p, r in zip(at, its, strict=True)]
    front, least = [], float("inf")
    for size, nats, row in sorted(points, key=lambda p: p[:2]):
        if nats < least:
            front.append((size, nats, row))
            least = nats
    axes.step([p[0] for p in front], [p[1] for p in front], where="post", color="0.4", lw=0.8)
    last = -1.0
    for size, nats, row in front:
        if size > last * 1.06:  # labels have room
            at = row["budget"] if row["kind"] == "remove" else f"{row['budget']:g} bits"
            axes.annotate(
                f"{row['name']} {at}", (size, nats), (3, 4), textcoords="offset points", size=6
            )
            last = size
    axes.set(xscale="log", yscale="log", xlabel="checkpoint, MB", ylabel="added loss, nats a token")
    axes.set_title(f"{model.whole['model']}: every method; the line is the Pareto front")
    axes.legend(frameon=False)
    figure.savefig(to, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def measured(models: Sequence[Model]) -> list[dict[str, Any]]:
    """For moecule/measured.json: packaged recipes at 25 % or 2.5 bits, the mean of the seeds."""
    out = []
    for kind, budget, at in (
        ("remove", "25%", "25% dropped"),
        ("round", 2.5, "2.5 bits"),
        ("round", 3.0, "3 bits"),
    ):
        for name in sorted(
            dict.fromkeys(r["name"] for m in models for r in m.rows if r["kind"] == kind)
        ):
            if (
                "," in name
                or not any(m.of(kind, name, budget) for m in models)
                or (budget == 3.0 and models[0].of(kind, name, 2.5))
            ):
                continue
            nats = {
                m.whole["model"]: round(float(np.mean([added(r, m.whole)[0] for r in of])), 4)
                for m in models
                if (of := m.of(kind, name, budget))
            }
            out.append(
                {"recipe": name, "at": at, "added_nats": nats, "source": "experiments/equal_bytes"}
            )
    name, made = COMPOSED
    of = {m.whole["model"]: m.of("both", name, 2.5)[0] for m in models}
    by_model = {m.whole["model"]: m.whole for m in models}
    nats = {n: round(added(row, by_model[n])[0], 4) for n, row in of.items()}
    at, source = "the bytes of 2.5 bits", "experiments/equal_bytes"
    return [*out, {"recipe": made, "at": at, "added_nats": nats, "source": source}]


def page(models: Sequence[Model]) -> str:
    first = models[0].whole
    lines = [(HERE / "text.md").read_text().format(device=first["device"], **first["settings"])]
    for m in models:
        name = m.whole["model"]
        nats = np.mean([np.mean(of["loss"]) for of in m.whole["by_file"].values()])
        lines.append(
            f"## {name}\n\nLoss {nats:.4f}, {100 * hit(m.whole):.1f} % of tokens the likeliest; experts "
            f"{m.whole['expert_bytes'] / 1e6:.2f} of {m.whole['total_bytes'] / 1e6:.2f} MB.\n\n"
            f"![{name}: added loss against bytes]({name}.svg)\n\n### The best within so many bytes\n"
        )
        lines += [*best(m), "### Removing\n", *table(m, "remove", SHARES, "25%")]
        lines += ["### Rounding\n", *table(m, "round", BITS, 2.5)]
        lines += ["### Removing, then rounding\n"]
        lines += [*table(m, "both", BITS, 2.0)]
    return "\n".join(lines)


def main() -> None:
    rows = [json.loads(line) for line in (HERE / "rows.jsonl").read_text().splitlines()]
    models = [Model(r for r in rows if r["model"] == n) for n in sorted({r["model"] for r in rows})]
    for m in models:
        plot(m, HERE / f"{m.whole['model']}.svg")
    (HERE / "README.md").write_text(page(models))
    made = measured(models)
    others = [of for of in json.loads(MEASURED.read_text()) if of["source"] != made[0]["source"]]
    MEASURED.write_text(json.dumps([*made, *others], indent=1) + "\n")


if __name__ == "__main__":
    main()
