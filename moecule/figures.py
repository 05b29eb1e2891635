"""The figures of a report about one model: what was done to each expert, and what it cost by layer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from moecule.blocks import Bar, Cell, Figure, Section, Table
from moecule.depth import Sampled
from moecule.drawing import Line, Named, heat_map, lines
from moecule.plan import Drop, Fate, Keep, Merge
from moecule.run import Run

USE_EDGES = (0.1, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0)  # of an even share
BIT_EDGES = (0.5, 1.25, 1.75, 2.25, 2.75, 3.5, 4.5, 8.5)  # 2 bits have one colour in all reports
ERROR_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the mean error
MASSES = {
    "mass": "the router's probability, summed over the tokens routed to an expert",
    "soft": "the router's probability, summed over all tokens",
    "coef": "the weights that outputs of an expert got, summed",
}
TRIALS = {
    "norm": "the length of the change of the block's output",
    "squared": "the squared change of the block's output",
    "fisher": "the squared change of the loss, to first order",
    "gradient": "the squared change of the block's output, weighted by the squared gradient",
}
Rows = Mapping[int, Sequence[float | None]]


def expert_section(run: Run, key: str) -> Section:
    """Heat maps, layers by experts."""
    figures = [*_fates(run, key), *_uses(run, key)]
    notes = []
    if not run.experts:
        notes.append(
            "How much each expert was used, and what rounding it does, is absent: the folder has "
            "neither evidence.json nor stats. Compress again for it."
        )
    elif run.trial is None:
        notes.append("The recipe rounds no expert on trial, so there is no map of such errors.")
    return Section(
        "What was done to each expert",
        "A row is a layer, a column an expert. Maps of use are of the calibration text.",
        tuple(figures),
        (layer_table(run),),
        tuple(notes),
    )


def layer_table(run: Run) -> Table:
    """The maps in a few numbers a layer."""
    head = ["layer", "experts", "stay", "bits, mean"]
    head += ["busiest", "least used"] if run.experts else []
    rows: list[list[Cell]] = []
    for i, fates in sorted(run.plan.layers.items()):
        kept = [f for f in fates if isinstance(f, Keep)]
        bits = sum(f.mean_bits for f in kept) / max(len(kept), 1)
        row: list[Cell] = [str(i), str(len(fates)), str(len(kept)), Bar(f"{bits:.2f}", bits / 16)]
        if run.experts:
            count = run.experts[i].count
            total = max(sum(count), 1e-300)
            row += [f"{100 * max(count) / total:.1f} %", f"{100 * min(count) / total:.2g} %"]
        rows.append(row)
    return Table.of("By layer", head, rows, folded=True)


def _fates(run: Run, key: str) -> list[Figure]:
    layers = {i: run.plan.layers[i] for i in sorted(run.plan.layers)}
    out, gone = [], any(not isinstance(f, Keep) for of in layers.values() for f in of)
    bits = {
        i: [f.mean_bits if isinstance(f, Keep) else None for f in of] for i, of in layers.items()
    }
    found = sorted({b for of in bits.values() for b in of if b is not None})
    if len(found) > 1 or gone or not run.plan.narrowed:
        swatches = [(f"k{bisect_right(BIT_EDGES, b)}", _bits(b)) for b in found]
        title = "Bits" if len(found) > 1 or found != [16] else "Experts that stay"
        text = "Code bits a weight that each expert is given."
        if found == [16]:
            text = "Which experts stay, as they are, and which are dropped or merged."
        out.append(
            _map(
                run,
                f"{key}-bits",
                title,
                "teal",
                bits,
                BIT_EDGES,
                [*swatches[:9], *([("gone", "dropped or merged")] if gone else [])],
                text,
                _fate_text,
            )
        )
    if run.plan.narrowed:
        wide = {i: of.channels for i, of in run.experts.items()}
        kept = {i: [_share(f, wide.get(i)) for f in of] for i, of in layers.items()}
        edges = tuple(k / 8 for k in range(1, 8))
        if any(v is not None and v > 1 for of in kept.values() for v in of):  # widths are not known
            most = max(v for of in kept.values() for v in of if v is not None)
            edges = tuple(most * k / 8 for k in range(1, 8))
        swatches = [(f"k{k}", f"{k}/8 to {k + 1}/8") for k in range(8)]
        text = "Share of each expert's channels that stays."
        out.append(
            _map(run, f"{key}-ch", "Channels kept", "teal", kept, edges, swatches, text, _fate_text)
        )
    return out


def _uses(run: Run, key: str) -> list[Figure]:
    if not run.experts:
        return []
    use = {i: _even(of.count) for i, of in run.experts.items()}
    key_use = _classes(USE_EDGES)
    out = [
        _map(
            run, f"{key}-use", "Usage", "blue", use, USE_EDGES, key_use,
            "How often each expert was used; 1 is an even share of its layer's pairs of token and expert.",
        )
    ]  # fmt: skip
    if run.mass is not None:
        mass = {i: _even(of.mass or ()) for i, of in run.experts.items()}
        text = f"{MASSES[run.mass].capitalize()}; 1 is an even share of its layer's."
        out.append(
            _map(run, f"{key}-mass", "Routing mass", "violet", mass, USE_EDGES, key_use, text)
        )
    widths = sorted(next(iter(run.experts.values())).trial)
    if widths:
        wanted = run.plan.nominal_bits
        bits = min(widths, key=lambda b: (abs(b - wanted), b))
        errors = {i: of.trial[bits] for i, of in run.experts.items()}
        every = [v for of in errors.values() for v in of]
        mean = max(sum(every) / len(every), 1e-300)
        shown = {i: [v / mean for v in of] for i, of in errors.items()}
        what = TRIALS.get(run.trial or "", "the error")
        text = f"Each expert alone rounded to {bits} bits: {what}; 1 is the mean over all experts."
        keys = _classes(ERROR_EDGES)
        title = f"Trial error at {bits} bits"
        out.append(_map(run, f"{key}-err", title, "orange", shown, ERROR_EDGES, keys, text))
    return out


def _map(
    run: Run,
    key: str,
    title: str,
    hue: str,
    values: Rows,
    edges: Sequence[float],
    swatches: Sequence[tuple[str, str]],
    text: str,
    tell: Callable[[Fate, float | None], str] | None = None,
) -> Figure:
    """`tell`: what a cell says where it is more than its number."""
    told = {
        i: [
            _short(v) if tell is None else tell(fate, v)
            for v, fate in zip(of, run.plan.layers[i], strict=True)
        ]
        for i, of in values.items()
    }
    n = max(map(len, values.values()))
    rows = [(str(i), *of) for i, of in told.items()]
    table = Table.of(f"{title}: all numbers", ("layer", *map(str, range(n))), rows, folded=True)
    shape = f"{len(values)} layers by {n} experts."
    svg = heat_map(Named(key, title, f"{text} {shape}"), values, edges, told)
    where = tuple((f"{hue} {style}", name) for style, name in swatches)
    return Figure(title, f'<div class="hue {hue}">{svg}</div>', table, where, text, wide=True)


def depth_section(run: Run, key: str) -> Section:
    """Loss and KL by how many layers are compressed, and how far hidden states have gone."""
    title = "What each layer adds"
    sampled = run.result.sampled
    if sampled is None:
        absent = "Absent: this result was not measured by layer. Run: moecule evaluate OUT --against MODEL"
        return Section(title, notes=(absent,))
    base = sampled.loss_nats
    added = [(float(d.layer), d.loss_nats - base) for d in sampled.depths]
    kl = [(float(d.layer), d.kl_nats) for d in sampled.depths]
    error = [(float(d.layer), d.error) for d in sampled.depths]
    table = _depth_table(sampled)
    text = (
        f"A sample of {sampled.tokens} tokens through the first layers of the compressed model and on "
        "through the original's: the last point is the compressed model."
    )
    named = Named(
        f"{key}-depth",
        "Added loss and KL by depth",
        f"{text} Added loss ends at {added[-1][1]:.4f}, KL at {kl[-1][1]:.4f} nats a token.",
    )
    far = Named(
        f"{key}-far",
        "How far hidden states have gone",
        f"Squared error over squared length, after each layer; {error[-1][1]:.4f} after the last.",
    )
    return Section(
        title,
        text,
        (
            Figure(
                "Added loss and KL",
                lines(
                    named,
                    (Line("added loss", "a", added), Line("KL", "b", kl, "square")),
                    "layers compressed up to",
                    "nats a token",
                ),
                table,
                (("dot a", "added loss"), ("square b", "KL to the original")),
            ),
            Figure(
                "Error of hidden states",
                lines(far, (Line("error", "c", error),), "after layer", "share of squared length"),
                table,
                (("dot c", "both models' hidden states apart, each model on its own"),),
                again=True,
            ),
        ),
    )


def _depth_table(sampled: Sampled) -> Table:
    kl = [0.0, *(d.kl_nats for d in sampled.depths)]
    steps = [b - a for a, b in zip(kl, kl[1:], strict=False)]
    most = max(map(abs, steps)) or 1.0
    rows = [
        (
            str(d.layer),
            f"{d.loss_nats - sampled.loss_nats:+.4f}",
            f"{d.kl_nats:.4f}",
            Bar(f"{step:+.4f}", abs(step) / most, "worse" if step > 0 else "better"),
            f"{d.error:.4f}",
        )
        for d, step in zip(sampled.depths, steps, strict=True)
    ]
    head = ("up to layer", "added loss", "KL", "KL that it adds", "error of hidden states")
    return Table.of("By layer, all numbers", head, rows, folded=True)


def _even(values: Sequence[float]) -> list[float | None]:
    total = max(sum(values), 1e-300)
    return [v / total * len(values) for v in values]


def _share(fate: Fate, channels: int | None) -> float | None:
    if not isinstance(fate, Keep):
        return None
    if fate.channels is None:
        return 1.0
    return fate.channels / channels if channels else float(fate.channels)


def _fate_text(fate: Fate, value: float | None) -> str:
    if isinstance(fate, Drop):
        return "-"
    if isinstance(fate, Merge):
        return f"in {fate.into}"
    if fate.channels is not None:
        return str(fate.channels)
    return fate.code


def _bits(bits: float) -> str:
    return "as it is (16 bits)" if bits == 16 else f"{bits:.3g} bit{'s' if bits != 1 else ''}"


def _short(value: float | None) -> str:
    """Three letters or so."""
    if value is None:
        return "-"
    if value == 0 or 0.095 <= value < 99.5:
        return f"{value:.1f}" if value else "0"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _classes(edges: Sequence[float]) -> list[tuple[str, str]]:
    names = [f"below {edges[0]:g}"]
    names += [f"{a:g} to {b:g}" for a, b in zip(edges, edges[1:], strict=False)]
    names.append(f"{edges[-1]:g} or more")
    return [(f"k{k}", name) for k, name in enumerate(names)]
