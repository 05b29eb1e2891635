"""Which channels of experts stay longest: a plan's file beside its text, for they are too many for text.

The plan says how many channels an expert keeps, this file which: the first so many. So counts may be
edited in the plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moecule.errors import PlanError
from moecule.files import save_whole, write_text
from moecule.narrow import Order
from moecule.plan import Plan


def order_file(plan: Path) -> Path:
    """Where it lies beside the plan's text."""
    return plan.with_name(f"{plan.name.removesuffix('.yaml')}.channels")


def order_digest(order: Order) -> str:
    """sha256 of the channels' numbers, 16 hex digits."""
    total = hashlib.sha256()
    for i, of in sorted(order.items()):
        total.update(f"{i} {tuple(of.shape)} ".encode())
        total.update(of.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def with_order(plan: Plan, order: Order) -> Plan:
    """The plan, naming its channels."""
    return replace(plan, order=order, channels=order_digest(order))


def save_plan(plan: Plan, file: Path) -> None:
    """The plan's text, and beside it the order of channels where it names one.

    Raises OutputError where they cannot be written.
    """
    if plan.channels is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"layer_{i:04d}": of.contiguous() for i, of in plan.order.items()}
        save_whole(tensors, order_file(file))
    write_text(file, plan.dumps())


def read_plan(path: str | Path) -> Plan:
    """A plan from its file, and the order of channels beside it.

    Raises PlanError where they cannot be read.
    """
    try:
        plan = Plan.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(
            f"{path} cannot be read as a plan: {e}; give a file that moecule plan made"
        ) from e
    if plan.channels is None:
        return plan
    file = order_file(Path(path))
    try:
        order = {int(name[6:]): of for name, of in load_file(file).items()}
    except (OSError, ValueError, SafetensorError) as e:
        raise PlanError(
            f"{path} says how many channels experts keep, and {file.name} beside it, which says which, "
            f"cannot be read ({' '.join(str(e).split())}); plan again"
        ) from e
    _check(order, file)
    if order_digest(order) != plan.channels:
        raise PlanError(
            f"{file} is not the order of channels that {path} was made with; plan again"
        )
    return replace(plan, order=order)


def _check(order: Mapping[int, Tensor], file: Path) -> None:
    for i, of in order.items():
        fits = of.dim() == 2 and of.dtype == torch.int32
        if not fits or not torch.equal(of.sort(dim=1).values, _all(of)):
            raise PlanError(f"{file}: layer {i} does not name every channel once; plan again")


def _all(of: Tensor) -> Tensor:
    """Every channel once, in each row."""
    return torch.arange(of.shape[1], dtype=torch.int32).expand_as(of)
