"""The loop that trains: AdamW, a warm-up and a cosine, the best by a held-out figure.

    for step: the windows of the step -> loss, backward, clip, AdamW
    every `every` steps: the held-out figure; what is trained, and AdamW's moments, to disk

What comes out is never worse, by that figure, than what went in. Each step's windows and noise are
functions of the seed and the step, so a killed run that goes on ends with the same bits.
Parameters may be shards of FSDP2 or of expert parallelism: each process then keeps its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from moecule.errors import OutputError, RecipeError
from moecule.files import parse_json, save_whole, write_text, writing
from moecule.ranks import SOLO, Ranks
from moecule.train.shards import clip, give_back, local

Loss = Callable[[Any, Int[Tensor, "B S"]], Float[Tensor, ""]]  # (model, windows) -> nats a token
Check = Callable[[], float]  # a held-out figure; lower is better
State = dict[str, Tensor]
Precision = Literal["float32", "bfloat16"]
FILE = "trained.json"
BETAS = (0.9, 0.95)
WORSE = (2.0, 1.0)  # a figure beyond twice the first one and a nat more: it diverges
RECENT = 0.9  # of the mean loss that is watched, what stays at each step


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int = 200
    batch: int = 16  # windows a step, over all processes
    micro: int = 0  # windows at a time in a process; 0: all that it has of a step
    lr: float = 1e-3
    warmup: float = 0.05  # share of the steps in which the rate rises
    end: float = 0.1  # share of the rate that is left at the end of the cosine
    decay: float = 0.0  # AdamW's, of matrices
    clip: float = 1.0  # norm of the gradient, at most
    every: int = 50  # steps from one held-out figure to the next
    seed: int = 0
    precision: Precision = "float32"  # of products, by autocast

    def __post_init__(self) -> None:
        """Raises RecipeError for what cannot be."""
        for name in ("steps", "batch", "every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} = {getattr(self, name)}, wanted 1 or more")
        if self.micro < 0:
            raise RecipeError(f"micro = {self.micro}, wanted 1 window or more, or 0 for all")
        for name in ("lr", "clip"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise RecipeError(f"{name} = {getattr(self, name):g}, wanted more than 0")
        if not (self.decay >= 0 and math.isfinite(self.decay)):
            raise RecipeError(f"decay = {self.decay:g}, wanted 0 or more")
        if not 0 <= self.seed < 10**9:
            raise RecipeError(f"seed = {self.seed}, wanted 0 to 999999999")
        if self.precision not in get_args(Precision):
            raise RecipeError(
                f"precision = {self.precision!r}, wanted {' or '.join(get_args(Precision))}"
            )
        for name in ("warmup", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} = {getattr(self, name):g}, wanted a share from 0 to 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        at = (step - rising) / max(1, self.steps - rising)
        return self.lr * (self.end + (1 - self.end) * (1 + math.cos(math.pi * at)) / 2)

    def picks(self, step: int, n: int) -> list[int]:
        """Which of n windows a step is given: all once, in a seeded order, before any again."""
        at = range(step * self.batch, (step + 1) * self.batch)
        orders = {e: self._order(e, n) for e in {i // n for i in at}}
        return [orders[i // n][i % n] for i in at]

    def _order(self, epoch: int, n: int) -> list[int]:
        lot = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(n, generator=lot).tolist()


@dataclass
class Trained:
    """What came of it."""

    began: float | None  # the held-out figure before the first step; None: none was asked for
    best: float | None = None
    best_step: int = 0
    steps: int = 0  # that were made
    history: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    stopped: str | None = None  # why, where it was before the last step

    @staticmethod
    def from_dict(said: Mapping[str, Any]) -> Trained:
        """Of what JSON made of it. Raises KeyError, TypeError or ValueError where it is none."""
        return Trained(**{**said, "history": [(s, v, c) for s, v, c in said["history"]]})


@dataclass
class _Run:
    """All that a step reads or changes."""

    named: Mapping[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    best: State
    done: Trained
    ranks: Ranks
    recent: float | None = None  # mean of the last losses
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)


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
    tick: Callable[[], None] = lambda: None,
    after: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train, in place, what of the model wants a gradient.

    `rates`: of some parameters by name, what share of the schedule's rate is theirs.
    `stored`: of some, the dtype that they will be kept in: what is checked, and stays, is rounded to it.
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
    with _in_memory():
        run = _begin(named, schedule, figure, folder, ranks, rates or {})
        run.stored = stored or {}
        for _ in range(run.done.steps):
            tick()
        for step in range(run.done.steps, schedule.steps):
            if run.done.stopped is not None:
                break
            value = _step(model, loss, windows, schedule, run, step)
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
                    _save(run, folder)
            tick()
    if check is not None or run.done.stopped is not None:
        _put(named, run.best)
    return run.done


def _figure(model: Any, check: Check) -> float:
    """Leaving nothing gathered: a root keeps what its forward gathered, which `_put` would miss."""
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
            "shorter --length, --checkpointing, or --parts that move less"
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
) -> _Run:
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
        return _reopen(named, optimiser, folder, ranks)
    began = None if check is None else check()
    if began is not None and not math.isfinite(began):
        raise RecipeError(f"the model's held-out loss is {began}; it is damaged, make it again")
    return _Run(named, optimiser, _copied(named), Trained(began, began), ranks)


def _decays(name: str, parameter: Tensor, rates: Mapping[str, float]) -> bool:
    """Matrices do; not what has a rate of its own (scales), or biases that lie together."""
    return parameter.dim() > 1 and name not in rates and not name.endswith("bias")


def _step(
    model: Any,
    loss: Loss,
    windows: Int[Tensor, "N S"],
    schedule: Schedule,
    run: _Run,
    step: int,
) -> float:
    """One step; the mean loss over all its windows, nats a token."""
    picks = torch.tensor(run.ranks.mine(schedule.picks(step, len(windows))))
    device = next(iter(run.named.values())).device
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


def _copied(named: Mapping[str, nn.Parameter]) -> State:
    return {n: local(p.detach()).cpu().clone() for n, p in named.items()}


@torch.no_grad()
def _put(named: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    for name, parameter in named.items():
        local(parameter.detach()).copy_(state[name])


def _note(run: _Run, step: int, value: float, check: Check | None) -> None:
    """The held-out figure; the best is kept."""
    done, found = run.done, None
    now = _copied(run.named)
    kept = {n: t.to(run.stored.get(n, t.dtype)).to(t.dtype) for n, t in now.items()}
    if check is not None and done.stopped is None:
        _put(run.named, kept)
        found = check()
        _put(run.named, now)
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


def _save(run: _Run, folder: Path) -> None:
    """What the run goes on from: each process its shards, then one file that says they are there."""
    step, rank = run.done.steps, run.ranks.rank
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = {f"now.{n}": t for n, t in _copied(run.named).items()}
    state |= {f"best.{n}": t for n, t in run.best.items()}
    for name, parameter in run.named.items():
        for which, moment in run.optimiser.state[parameter].items():
            state[f"{which}.{name}"] = local(moment).cpu().clone()
    save_whole(state, folder / f"step-{step}-of-{run.ranks.size}-{rank}.safetensors")
    run.ranks.wait()
    if run.ranks.is_first:
        said = {**vars(run.done), "recent": run.recent, "processes": run.ranks.size}
        write_text(folder / FILE, json.dumps(said) + "\n")
    run.ranks.wait()
    for old in folder.glob(f"step-*-{rank}.safetensors"):
        if not old.name.startswith(f"step-{step}-"):
            old.unlink()


def _reopen(
    named: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    folder: Path,
    ranks: Ranks,
) -> _Run:
    """Raises OutputError where what was left is damaged, or was left by other processes."""
    mend = f"remove {folder} to begin again"
    try:
        said = parse_json((folder / FILE).read_text(encoding="utf-8"))
        recent, size = said.pop("recent"), said.pop("processes")
        done = Trained.from_dict(said)
        if size != ranks.size:
            raise OutputError(
                f"{folder} was left by {size} processes, and this is one of {ranks.size}; start as many, "
                f"or {mend}"
            )
        state = load_file(folder / f"step-{done.steps}-of-{size}-{ranks.rank}.safetensors")
        _put(named, {n: state[f"now.{n}"] for n in named})
        best = {n: state[f"best.{n}"] for n in named}
        for name, parameter in named.items():
            if f"exp_avg.{name}" not in state:  # it had no gradient yet
                continue
            moments = {w: torch.zeros_like(parameter) for w in ("exp_avg", "exp_avg_sq")}
            for which, moment in moments.items():
                local(moment).copy_(state[f"{which}.{name}"])
            made = state[f"step.{name}"].to(
                local(parameter).device
            )  # where the fused kernel wants it
            optimiser.state[parameter] = {"step": made, **moments}
    except OutputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
        raise OutputError(f"what a killed run left in {folder} is damaged ({e!r}); {mend}") from e
    return _Run(named, optimiser, best, done, ranks, recent)
