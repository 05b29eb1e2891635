"""Task patterns: which experts each of several domains wants, and whose domain a prompt is of.

PreMoe's retrieval (TAER), Pei et al. 2025, arXiv:2505.17639. A store holds, of each task, every layer's
experts in the order in which they are to stay, and what the model's first router makes of windows of its
text. A prompt is passed up to that router, without an expert, and gets the task it is nearest to:

    by "tcess", the paper's:  the least distance of v,  v_e = 1/T sum of z_e over tokens whose largest is e
    by "spread", ours:        the least (m - m_task)' C^-1 (m - m_task),  m = 1/T sum of z

z are the router's logits of a token, T tokens. C is how such means differ from window to window within a
task, of all tasks together: what differs from one text to the next of the same task counts little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int32
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moecule.drop import IN_GROUP
from moecule.errors import DataError, RecipeError
from moecule.files import parse_json, save_whole
from moecule.stats import Statistic

By = Literal["spread", "tcess"]
FORMAT = 1
SHRINK = 0.03  # of C: off its diagonal it is less by this share, so that few windows will do
PARTS = ("key", "mean", "scatter", "ranks")


@dataclass(frozen=True)
class Task:
    """One domain."""

    name: str
    windows: int  # of its text
    key: Float64[Tensor, " E"]  # v, mean over windows
    mean: Float64[Tensor, " E"]  # m, mean over windows
    scatter: Float64[Tensor, "E E"]  # sum over windows of the outer product of m - mean
    ranks: Int32[Tensor, "L E"]  # the layers' experts, those that stay longest first


@dataclass(frozen=True)
class Patterns:
    """A store: one file."""

    model: str  # as the user named it
    digest: str  # of its checkpoint
    tasks: tuple[Task, ...]
    made_by: Mapping[str, Any]

    def save(self, file: Path) -> None:
        """Raises OutputError where it cannot be written."""
        tensors = {
            f"{t.name}.{part}": getattr(t, part).contiguous() for t in self.tasks for part in PARTS
        }
        doc = {
            "format": FORMAT,
            "model": self.model,
            "digest": self.digest,
            "windows": {t.name: t.windows for t in self.tasks},
            "made_by": dict(self.made_by),
        }
        save_whole(tensors, file, said={"moecule_patterns": json.dumps(doc)})

    @staticmethod
    def load(file: str | Path) -> Patterns:
        """Raises DataError for a file that holds none."""
        hint = "make them with moecule patterns"
        try:
            with safe_open(file, "pt") as found:
                said = parse_json((found.metadata() or {}).get("moecule_patterns", "{}"))
                tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as e:
            why = " ".join(str(e).split())
            raise DataError(f"{file} cannot be read as patterns ({why}); {hint}") from e
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise DataError(f"{file} holds no patterns of format {FORMAT}; {hint}")
        windows, made_by = said.get("windows"), said.get("made_by")
        if not isinstance(windows, dict) or not windows or not isinstance(made_by, dict):
            raise DataError(f"{file} is damaged; {hint}")
        parts: dict[str, Any] = {
            task: {p: tensors.get(f"{task}.{p}") for p in PARTS} for task in windows
        }
        if not all(type(n) is int and _is_whole(parts[task]) for task, n in windows.items()):
            raise DataError(f"{file} is damaged; {hint}")
        tasks = tuple(Task(task, n, **parts[task]) for task, n in windows.items())
        return Patterns(str(said.get("model")), str(said.get("digest")), tasks, made_by)


def _is_whole(parts: Mapping[str, Any]) -> bool:
    if any(t is None for t in parts.values()) or parts["key"].dim() != 1 or not len(parts["key"]):
        return False
    ranks, n = parts["ranks"], len(parts["key"])
    shapes = {"key": (n,), "mean": (n,), "scatter": (n, n)}
    everyone = torch.arange(n, dtype=torch.int32)
    return (
        all(parts[p].shape == shape for p, shape in shapes.items())
        and all(parts[p].dtype == torch.float64 for p in shapes)
        and all(bool(parts[p].isfinite().all()) for p in shapes)
        and ranks.dim() == 2
        and torch.equal(ranks.sort(1).values, everyone.expand(len(ranks), n))
    )


def tcess_of(logits: Float[Tensor, "T E"]) -> Float64[Tensor, " E"]:
    """v of a text: 1/T sum of the tokens' largest logits, at their experts."""
    z, expert = logits.double().max(-1)
    sums = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    return sums.index_put_((expert,), z, accumulate=True) / len(logits)


def mean_of(logits: Float[Tensor, "T E"]) -> Float64[Tensor, " E"]:
    """m of a text."""
    return logits.double().mean(0)


# of a batch that is one window
KEY = Statistic("window_tcess", of_router=lambda r: tcess_of(r.logits))
MEAN = Statistic("window_mean", of_router=lambda r: mean_of(r.logits))
OUTER = Statistic("window_outer", of_router=lambda r: mean_of(r.logits).outer(mean_of(r.logits)))
SEEN = (KEY, MEAN, OUTER)


def task_of(
    name: str, windows: int, first: Mapping[str, Tensor], scores: Sequence[Float64[Tensor, " E"]]
) -> Task:
    """Of `first`, the sums of SEEN at the first router, and every layer's scores.

    Raises RecipeError where layers have different numbers of experts.
    """
    if len({len(s) for s in scores}) > 1:
        raise RecipeError(
            "patterns want as many experts in every layer, and this model's differ; drop experts "
            "instead (moecule plan --drop)"
        )
    mean = first[MEAN.name] / windows
    ranks = torch.stack([s.argsort(descending=True, stable=True).int() for s in scores])
    scatter = first[OUTER.name] - windows * mean.outer(mean)
    return Task(name, windows, first[KEY.name] / windows, mean, scatter, ranks)


def distances(
    patterns: Patterns, logits: Float[Tensor, "T E"], by: By = "spread"
) -> dict[str, float]:
    """{task: how far the prompt is from it}, the nearest first; ties go to the task named first."""
    if by == "tcess":
        far = [float((tcess_of(logits.cpu()) - t.key).norm()) for t in patterns.tasks]
    else:
        far = _by_spread(patterns.tasks, mean_of(logits.cpu()))
    found = zip([t.name for t in patterns.tasks], far, strict=True)
    return dict(sorted(found, key=lambda at: at[1]))


def _by_spread(tasks: Sequence[Task], m: Float64[Tensor, " E"]) -> list[float]:
    freedom = sum(t.windows for t in tasks) - len(tasks)
    pooled = torch.stack([t.scatter for t in tasks]).sum(0) / max(freedom, 1)
    size = pooled.diagonal().clamp(min=0).sqrt()
    # a logit that never changes would otherwise decide everything; all alike: a plain distance
    size = size.clamp(min=1e-3 * float(size.max())) if size.max() > 0 else torch.ones_like(size)
    whitened = ((1 - SHRINK) * pooled / size.outer(size)).fill_diagonal_(1.0)
    away = torch.stack([(m - t.mean) / size for t in tasks], 1)
    return [float(x) for x in (away * torch.linalg.solve(whitened, away)).sum(0)]


@dataclass(frozen=True)
class Room:
    """How many experts a layer's router picks, of how many, and in which groups."""

    n: int
    top_k: int
    groups: int = 1
    top_groups: int = 1

    def check(self, left: int) -> None:
        """Raise RecipeError where `left` experts are more than there are, or too few for the router."""
        asked = f"{left} experts a layer were asked for (--experts)"
        if not self.top_k <= left <= self.n:
            raise RecipeError(
                f"{asked}; the router picks {self.top_k} of {self.n} for a token, so give "
                f"{self.top_k} to {self.n}"
            )
        each = left // self.groups
        if self.groups > 1 and (
            left % self.groups or each < IN_GROUP or each * self.top_groups < self.top_k
        ):
            least = max(IN_GROUP, -(-self.top_k // self.top_groups)) * self.groups
            raise RecipeError(
                f"{asked}; the router picks among {self.groups} groups, which must keep as many each: "
                f"give a multiple of {self.groups}, {least} or more"
            )
