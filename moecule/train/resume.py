"""A training run on disk: what it goes on from when it was killed.

step-N-of-P-R.safetensors   process R's parameters, the best of them so far, and AdamW's moments
trained.json                written when those of all processes are there
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moecule.errors import OutputError
from moecule.files import parse_json, save_whole, write_text, writing
from moecule.ranks import Ranks
from moecule.train.schedule import Trained
from moecule.train.shards import local

State = dict[str, Tensor]
FILE = "trained.json"


@dataclass
class Run:
    """All that a step reads or changes."""

    named: Mapping[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    best: State
    done: Trained
    ranks: Ranks
    recent: float | None = None  # mean of the last losses
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)


def copied(named: Mapping[str, nn.Parameter]) -> State:
    """What this process holds of each, in host memory."""
    return {n: local(p.detach()).cpu().clone() for n, p in named.items()}


@torch.no_grad()
def put(named: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """`copied`, the other way round; nothing may be gathered."""
    for name, parameter in named.items():
        local(parameter.detach()).copy_(state[name])


def save(run: Run, folder: Path) -> None:
    """What the run goes on from: each process its shards, then one file that says they are there.

    All processes must call it. Raises OutputError where there is no room.
    """
    step, rank = run.done.steps, run.ranks.rank
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = {f"now.{n}": t for n, t in copied(run.named).items()}
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


def reopen(
    named: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    folder: Path,
    ranks: Ranks,
) -> Run:
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
        put(named, {n: state[f"now.{n}"] for n in named})
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
    return Run(named, optimiser, best, done, ranks, recent)
