"""Trials: how far rounding one expert alone moves its block's output, at every width at once.

Only expert e changes then, so its own tokens are enough: miss(x) = coef * (E_b(x) - E(x)).

    norm      sum over the batches of  sqrt(sum_x |miss(x)|^2)
    squared   sum_x |miss(x)|^2
    fisher    sum_x (g(x) . miss(x))^2              g: the gradient of the loss by the block's output
    gradient  sum_x sum_d g_d(x)^2 miss_d(x)^2
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moecule.experts import Expert
from moecule.grid import CLIPS, quantized_at
from moecule.stats import Seen, Statistic

Error = Literal["norm", "squared", "fisher", "gradient"]
ClipName = Literal["none", "narrow", "wide"]


def _slope(seen: Seen) -> Float[Tensor, "t H"]:
    assert seen.grad is not None  # the statistic says backward
    return seen.grad.double()


ADDED: dict[Error, Callable[[Seen, Tensor], Tensor]] = {  # of [bits, t, H], what a batch adds
    "norm": lambda seen, miss: miss.square().sum((1, 2)).sqrt(),
    "squared": lambda seen, miss: miss.square().sum((1, 2)),
    "fisher": lambda seen, miss: (_slope(seen) * miss).sum(-1).square().sum(-1),
    "gradient": lambda seen, miss: (_slope(seen) * miss).square().sum((1, 2)),
}


def trial(error: Error, bits: tuple[int, ...], clip: ClipName, group: int) -> Statistic:
    """[E, len(bits)]: that error with one expert rounded to nearest, `group` columns to a scale."""
    add = ADDED[error]

    def measure(expert: Expert) -> Callable[[Seen], Float[Tensor, " bits"]]:
        up, down = (
            quantized_at(w, bits, group, CLIPS[clip]) for w in (expert.gate_up, expert.down)
        )

        def losses(seen: Seen) -> Float[Tensor, " bits"]:  # all widths at once: [bits, t, H]
            act = expert.gate(_linear(seen.x, up, expert.gate_up_bias))
            out = _linear(act, down, expert.down_bias)
            out = out if expert.end is None else expert.end(out)
            return add(seen, (seen.coef[:, None] * (out - seen.out)).double())

        return losses

    widths = "".join(map(str, bits))
    backward = error in ("fisher", "gradient")
    return Statistic(
        f"trial_{error}_{clip}_b{widths}_g{group}", of_expert=measure, backward=backward
    )


def _linear(
    x: Float[Tensor, "*bits t N"], w: Float[Tensor, "bits M N"], bias: Float[Tensor, " M"] | None
) -> Float[Tensor, "bits t M"]:
    out = x @ w.mT
    return out if bias is None else out + bias
