"""How many weights of experts become 0, as a plan says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecule.errors import PlanError


@dataclass(frozen=True)
class Sparse:
    """What share of the weights of experts that stay is not 0. Files do not shrink by it."""

    density: Mapping[int, float]  # {layer: of every expert}; of layers not named all stay
    mask: Mapping[str, Any]  # the method that says which, and its options

    def as_dict(self) -> dict[str, Any]:
        """For the plan's text."""
        return {"mask": dict(self.mask), "density": dict(sorted(self.density.items()))}

    @staticmethod
    def of(doc: Any) -> Sparse:
        """The inverse of `as_dict`. Raises PlanError for what is none."""
        try:
            density = {i: float(d) for i, d in doc["density"].items()}
            sparse = Sparse(density, dict(doc["mask"]))
            if set(doc) != {"mask", "density"} or any(type(i) is not int for i in density):
                raise ValueError("other keys, or layers that are no whole numbers")
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise PlanError(f"plan: sparse wants mask and density per layer, found {doc!r}") from e
        if not all(0 < d <= 1 for d in density.values()):  # NaN is not, either
            raise PlanError(
                f"plan: sparse wants densities above 0 and up to 1 by layer, found {doc!r}"
            )
        return sparse
