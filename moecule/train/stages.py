"""The stages of SlimMoE (slim.py): what is to be left after each, and how long it is taught."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from moecule.errors import RecipeError
from moecule.train.sensitivity import SIGNALS


@dataclass(frozen=True)
class Slimming:
    """What is to be left, and how it is found."""

    width: int | None = None  # channels of every expert; None: all
    groups: int | None = None  # of attention heads, in every layer; None: all
    stages: int = 2
    early: float = 0.1  # share of the steps that each stage but the last has
    multiple: int = 32  # of which the widths in between are multiples
    signal: str = "topk_ce"  # of SIGNALS: the loss of the first stage's scores
    full: bool = False  # score channels by all three slices, not by the down projection's alone
    samples: int = 64  # windows that are scored on
    batch: int = (
        1  # of them together; scores are means over batches, and one window each was the best
    )

    def __post_init__(self) -> None:
        """Raises RecipeError for what cannot be."""
        for name in ("stages", "multiple", "samples", "batch"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} = {getattr(self, name)}, wanted 1 or more")
        if not 0 < self.early * max(1, self.stages - 1) < 1:
            raise RecipeError(
                f"early = {self.early:g} of the steps for each of {self.stages - 1} stages before the last "
                "one, wanted more than 0, and less than all of them together"
            )
        if self.signal not in SIGNALS:
            raise RecipeError(f"signal = {self.signal!r}, wanted one of {', '.join(SIGNALS)}")
        if self.width is None and self.groups is None:
            raise RecipeError("nothing is to go; give --width, --groups, or both")


@dataclass(frozen=True)
class Stage:
    """What is left after it, and how long it is taught."""

    width: int
    groups: int | None  # None: as before
    steps: int


def stages_of(slimming: Slimming, full: int, steps: int) -> tuple[Stage, ...]:
    """The stages from experts of `full` channels on, of `steps` steps in all.

    >>> [s.width for s in stages_of(Slimming(width=960), 6400, 300)]
    [2464, 960]
    >>> [s.steps for s in stages_of(Slimming(width=448, stages=3), 6400, 300)]
    [30, 30, 240]

    Raises RecipeError for widths that do not fall from stage to stage, or steps that are too few.
    """
    n, last = slimming.stages, full if slimming.width is None else slimming.width
    if last < 1:
        raise RecipeError(f"width = {last}, wanted 1 to {full} channels")
    unit = slimming.multiple
    between = [unit * round(full * (last / full) ** (s / n) / unit) for s in range(1, n)]
    widths = [full, *between, last]
    falls = all(a > b for a, b in pairwise(widths))
    if not falls and (n > 1 or last > full):
        raise RecipeError(
            f"{n} stages from {full} to {last} channels in multiples of {unit} are {widths}, wanted each "
            "below the one before; give fewer --stages, another --width or a smaller --multiple"
        )
    each = round(slimming.early * steps)
    counts = [each] * (n - 1) + [steps - each * (n - 1)]
    if min(counts) < 1:
        raise RecipeError(
            f"{steps} steps are shared {counts} by {n} stages, wanted 1 or more for each; give more"
        )
    return tuple(
        Stage(width, slimming.groups if s + 1 == n else None, count)
        for s, (width, count) in enumerate(zip(widths[1:], counts, strict=True))
    )
