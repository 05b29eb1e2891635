"""What a model family does not say of itself: data, one file a family.

transformers knows how a checkpoint's names become modules and its experts describe their own
layout (`hf.py` reads both). Left over is how the router's numbers are meant, and under which
keys config.json counts the experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moecule.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """Facts of one `model_type`."""

    model_type: str  # as in config.json; also the file's name
    router: str = "gate"  # the experts' sibling that returns (logits, coef, index)
    scores: Literal["softmax", "sigmoid"] = "softmax"  # of the logits of all experts
    # whether the chosen coefficients are scaled to sum to 1: always, never, or as a config key says
    renormalise: bool | str = True
    count_keys: tuple[str, ...] = ("num_local_experts",)  # in config.json; those present count
    groups: str | None = None  # config key: the router picks groups of experts first

    def is_renormalised(self, config: Mapping[str, Any]) -> bool:
        """Whether a token's coefficients sum to a constant in this model."""
        if isinstance(self.renormalise, bool):
            return self.renormalise
        return bool(config.get(self.renormalise, False))


def load_family(model_type: str) -> Family:
    """The FAMILY of moecule/families/<model_type>.py.

    Raises CheckpointError for a model type that has no file.
    """
    known = family_names()
    if model_type not in known:
        raise CheckpointError(
            f"model_type {model_type!r} is not a Mixture-of-Experts family that moecule knows "
            f"({', '.join(known)}); docs/add-a-family.md says how to add one"
        )
    family: Family = importlib.import_module(f"moecule.families.{model_type}").FAMILY
    return family


def family_names() -> list[str]:
    """Every family there is, sorted."""
    return sorted(p.stem for p in (Path(__file__).parent / "families").glob("[a-z]*.py"))
