"""What one model loses more than another on the same windows, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scipy.special import stdtrit

from moecule.measure import Loss

SIGNIFICANT = 0.975  # two-sided 95 %


@dataclass(frozen=True)
class Gap:
    """Between two mean losses, nats a token; `half`: of its 95 % interval."""

    mean: float
    half: float | None
    why: str | None = None  # there is no interval

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if self.half is None else f" \u00b1 {self.half:.4f}")


def gap(ours: Mapping[str, Loss], theirs: Mapping[str, Loss]) -> Gap:
    """The loss of one model less the other's, over texts that count once each, from their windows.

    Windows are taken for a sample of their text, and the texts for all there are: each text's
    variance is that of its windows' own differences (by tokens, as a ratio), and the interval is
    Student's with Welch's degrees of freedom, for texts of few windows.
    """
    n = len(ours)
    mean = sum(ours[name].loss_nats - theirs[name].loss_nats for name in ours) / n
    parts = []  # of each text: variance of its mean, and windows
    for name, a in ours.items():
        b = theirs[name]
        if not (a.window_tokens and b.window_tokens):
            return Gap(mean, None, "no sums by window were kept; evaluate again")
        if a.window_tokens != b.window_tokens:
            return Gap(mean, None, f"windows of {name} were put together differently")
        count = len(a.window_tokens)
        if count < 2:
            return Gap(mean, None, f"{name} is one window")
        nats = [x - y for x, y in zip(a.window_nats, b.window_nats, strict=True)]
        rate, total = sum(nats) / sum(a.window_tokens), sum(a.window_tokens)
        missed = sum((d - rate * t) ** 2 for d, t in zip(nats, a.window_tokens, strict=True))
        parts.append((missed * count / (count - 1) / total**2, count))
    variance = sum(v for v, _ in parts)
    if not variance:
        return Gap(mean, 0.0)
    freedom = variance**2 / sum(v**2 / (count - 1) for v, count in parts)
    return Gap(mean, float(stdtrit(freedom, SIGNIFICANT)) * variance**0.5 / n)
