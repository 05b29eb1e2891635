"""The loop that trains: AdamW, a warm-up and a cosine, the best by a held-out figure.

    for step: the windows of the step -> loss, backward, clip, AdamW
    every `every` steps: the held-out figure; what is trained, and AdamW's moments, to disk

What comes out is never worse, by that figure, than what went in. Each step's windows and noise are
functions of the seed and the step, so a killed run that goes on ends with the same bits.
Parameters may be shards of FSDP2 or of expert parallelism: each process then keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moecule.errors import RecipeError
from moecule.ranks import SOLO, Ranks
from moecule.train.resume import FILE, Run, copied, put, reopen, save
from moecule.train.schedule import Schedule, Trained
from moecule.train.shards import clip, give_back

Loss = Callable[[Any, Int[Tensor, "B S"]], Float[Tensor, ""]]  # (model, windows) -> nats a token
Check = Callable[[], float]  # a held-out figure; lower is better
BETAS = (0.9, 0.95)
WORSE = (2.0, 1.0)  # a figure beyond twice the first one and a nat more: it diverges
RECENT = 0.9  # of the mean loss that is watched, what stays at each step


def train(
    model: Any,
    loss: Loss,
    windows: Int[Tensor, "N S"],
    schedule: Schedule,
    *,
    check: Check | None = None,
    folder: Path | None = None,
    ranks: Ranks = SOLO,
    rates: Mapping[str, float] | None = None,
    stored: Mapping[str, torch.dtype] | None = None,
    device: torch.device | None = None,
    tick: Callable[[], None] = lambda: None,
    after: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train, in place, what of the model wants a gradient.

    `rates`: of some parameters by name, what share of the schedule's rate is theirs.
    `stored`: of some, the dtype that they will be kept in: what is checked, and stays, is rounded to it.
    `device`: where the model computes; without, where its parameters lie.
    `folder`: a killed run goes on from what it left there; the caller removes it. `tick` is called once
    a step, `after` with the number of each step made. Without `check` the last state is kept, or the
    last one noted where the loss diverges.
    Raises RecipeError where nothing wants a gradient, processes cannot share a batch, or memory ends.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise RecipeError("nothing of the model is to be trained; name other parts (--parts)")
    check_batch(schedule, ranks.size)
    figure = None if check is None else partial(_figure, model, check)
    device = device or next(iter(named.values())).device
    with _in_memory():
        run = _begin(named, schedule, figure, folder, ranks, rates or {})
        run.stored = stored or {}
        for _ in range(run.done.steps):
            tick()
        for step in range(run.done.steps, schedule.steps):
            if run.done.stopped is not None:
                break
            value = _step(model, loss, windows, schedule, run, step, device)
            if not math.isfinite(value) or _diverges(value, run.recent):
                run.done.stopped = f"the loss diverged at step {step + 1} ({value:.4g} nats)"
            else:
                run.recent = (
                    value if run.recent is None else RECENT * run.recent + (1 - RECENT) * value
                )
            last = step + 1 == schedule.steps or run.done.stopped is not None
            run.done.steps = step + 1
            after(step + 1)
            if (step + 1) % schedule.every == 0 or last:
                _note(run, step + 1, value, figure)
                if folder is not None:
                    save(run, folder)
            tick()
    if check is not None or run.done.stopped is not None:
        put(named, run.best)
    return run.done


def _figure(model: Any, check: Check) -> float:
    """Leaving nothing gathered: a root keeps what its forward gathered, which `put` would miss."""
    found = check()
    give_back(model)
    return found


@contextmanager
def _in_memory() -> Iterator[None]:
    """Raises RecipeError where a step finds no room."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise RecipeError(
            f"a step finds no room ({str(e).split('. ')[0]}); give fewer windows at a time (--micro), a "
            "shorter --length, --checkpointing, --offload, or --parts that move less"
        ) from e


def check_batch(schedule: Schedule, size: int) -> None:
    """Raise RecipeError where so many processes cannot share a step's windows."""
    if schedule.batch % size:
        raise RecipeError(
            f"{size} processes cannot share {schedule.batch} windows a step; give --batch a multiple"
        )


def _diverges(value: float, began: float | None) -> bool:
    return began is not None and value > WORSE[0] * began + WORSE[1]


def _begin(
    named: Mapping[str, nn.Parameter],
    schedule: Schedule,
    check: Check | None,
    folder: Path | None,
    ranks: Ranks,
    rates: Mapping[str, float],
) -> Run:
    """At the first step, or where a killed run was."""
    groups = [
        {
            "params": [p],
            "weight_decay": schedule.decay * _decays(n, p, rates),
            "share": rates.get(n, 1.0),
        }
        for n, p in named.items()
    ]
    optimiser = torch.optim.AdamW(groups, lr=schedule.lr, betas=BETAS, fused=True)
    there = ranks.share(folder is not None and (folder / FILE).is_file(), 0)
    if there and folder is not None:
        return reopen(named, optimiser, folder, ranks)
    began = None if check is None else check()
    if began is not None and not math.isfinite(began):
        raise RecipeError(f"the model's held-out loss is {began}; it is damaged, make it again")
    return Run(named, optimiser, copied(named), Trained(began, began), ranks)


def _decays(name: str, parameter: Tensor, rates: Mapping[str, float]) -> bool:
    """Matrices do; not what has a rate of its own (scales), or biases that lie together."""
    return parameter.dim() > 1 and name not in rates and not name.endswith("bias")


def _step(
    model: Any,
    loss: Loss,
    windows: Int[Tensor, "N S"],
    schedule: Schedule,
    run: Run,
    step: int,
    device: torch.device,
) -> float:
    """One step; the mean loss over all its windows, nats a token."""
    picks = torch.tensor(run.ranks.mine(schedule.picks(step, len(windows))))
    total, mine = torch.zeros((), dtype=torch.float64), len(picks)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(schedule.seed * 1_000_003 + step)
        for part in picks.split(schedule.micro or mine):
            ids = windows[part].to(device)
            with torch.autocast(
                device.type, torch.bfloat16, enabled=schedule.precision == "bfloat16"
            ):
                value = loss(model, ids) * (len(part) / mine)
            value.backward()
            total += value.detach().double().cpu()
    mean = float(run.ranks.add_up(total)) / run.ranks.size
    if math.isfinite(mean) and not _diverges(mean, run.recent):
        clip(run.named.values(), schedule.clip)
        for group in run.optimiser.param_groups:
            group["lr"] = schedule.rate(step) * group["share"]
        run.optimiser.step()
    run.optimiser.zero_grad()
    return mean


def _note(run: Run, step: int, value: float, check: Check | None) -> None:
    """The held-out figure; the best is kept."""
    done, found = run.done, None
    now = copied(run.named)
    kept = {n: t.to(run.stored.get(n, t.dtype)).to(t.dtype) for n, t in now.items()}
    if check is not None and done.stopped is None:
        put(run.named, kept)
        found = check()
        put(run.named, now)
        assert done.began is not None and done.best is not None  # asked for when it began
        if not math.isfinite(found) or _diverges(found, done.began):
            done.stopped = f"the held-out loss diverged at step {step} ({found:.4g})"
        elif found < done.best:
            done.best, done.best_step, run.best = found, step, kept
    elif done.stopped is None:
        done.best_step, run.best = step, kept
    done.history.append((step, _finite(value), _finite(found)))


def _finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None
