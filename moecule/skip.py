"""Which (token, expert) pairs run, decided online, as a plan says it: by thresholds, or by learnt masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecule.errors import PlanError

ITEM_BYTES = 4  # of a number of a head: float32, whatever the model's dtype
LEARNT = "method"  # the key that only masks have


@dataclass(frozen=True)
class Skip:
    """Thresholds of ratios. See methods/odp.py."""

    thresholds: Mapping[int, tuple[float, ...]]  # {layer: ratio to the first expert, rank 1, 2 ...}
    protect: float = 0.0  # share of a prompt's tokens that skip nothing

    def as_dict(self) -> dict[str, Any]:
        """For the plan's text."""
        by_layer = sorted(self.thresholds.items())
        spaced = {i: " ".join(map(repr, t)) for i, t in by_layer}
        return {"protect": self.protect, "thresholds": spaced}

    def settings(self) -> dict[str, Any]:
        """For config.json."""
        thresholds = {str(i): list(t) for i, t in sorted(self.thresholds.items())}
        return {"protect": self.protect, "thresholds": thresholds}


@dataclass(frozen=True)
class Masks:
    """Heads of every MoE layer, which are learnt after the plan was carried out. See methods/otp.py."""

    how: Mapping[str, Any]  # the method and its options

    @property
    def hidden(self) -> int:
        """Units between what a head reads and what it says."""
        return int(self.how["hidden"])

    @property
    def keep(self) -> float:
        """The share of pairs that are to run."""
        return float(self.how["keep"])

    def as_dict(self) -> dict[str, Any]:
        """For the plan's text."""
        return dict(self.how)

    def settings(self) -> dict[str, Any]:
        """For config.json."""
        return dict(self.how)


def head_shapes(width: int, top_k: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """{tensor of a head: its shape}; `width`: of what the experts hear."""
    return {
        "up": (hidden, width + top_k),
        "up_bias": (hidden,),
        "down": (top_k, hidden),
        "down_bias": (top_k,),
    }


def head_bytes(width: int, top_k: int, hidden: int) -> int:
    """Of one head on disk."""
    return ITEM_BYTES * sum(map(math.prod, head_shapes(width, top_k, hidden).values()))


def skip_of(doc: Any) -> Skip | Masks:
    """The inverse of `as_dict`. Raises PlanError for what is neither."""
    return _masks(doc) if isinstance(doc, dict) and LEARNT in doc else _thresholds(doc)


def _thresholds(doc: Any) -> Skip:
    try:
        thresholds = {
            _layer(i): tuple(float(x) for x in str(t).split()) for i, t in doc["thresholds"].items()
        }
        skip = Skip(thresholds, float(doc["protect"]))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise PlanError(
            f"plan: skip wants protect and thresholds per layer, or a method and its options, found {doc!r}"
        ) from e
    numbers = [skip.protect, *(x for t in thresholds.values() for x in t)]
    if not all(0 <= x <= 1 for x in numbers):  # NaN is not, either
        raise PlanError(f"plan: skip wants numbers from 0 to 1, found {doc!r}")
    return skip


def _masks(doc: dict[str, Any]) -> Masks:
    hidden, keep = doc.get("hidden"), doc.get("keep")
    if type(hidden) is not int or not 1 <= hidden < 10**6:  # True is an int
        raise PlanError(f"plan: skip: hidden is {hidden!r}, wanted how many units a head has")
    if not isinstance(keep, int | float) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise PlanError(f"plan: skip: keep is {keep!r}, wanted the share of pairs that run")
    return Masks(doc)


def _layer(key: Any) -> int:
    if type(key) is int and 0 <= key < 10**6:  # True is an int
        return key
    raise PlanError(f"plan: skip names {key!r}, wanted a layer's number")
