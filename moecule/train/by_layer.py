"""Healing a model that does not fit: one decoder layer after the other learns its teacher's output.

    minimise over what moves in layer l    |S_l(x) - T_l(y)|^2 / |T_l(y)|^2

x is what the healed layers below give, y what the teacher's give: a layer also makes up for those
before it (as in block-wise reconstruction, Li et al. 2021, arXiv:2102.05426). One layer of either
model is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moecule.batch import Batch
from moecule.files import parse_json, save_whole, write_text
from moecule.hf import PACKED, Streamed
from moecule.journal import Trail
from moecule.train.loop import train
from moecule.train.moved import stored_as
from moecule.train.schedule import Schedule, Trained
from moecule.train.student import Student, mark, relative_rates
from moecule.train.thaw import freeze, thaw
from moecule.walk import Step, Tick, walk

TINY = 1e-12  # no target is all 0


def heal_layers(
    student: Student,
    streamed: Streamed,
    teacher: Streamed,
    batches: Sequence[Batch],
    held: int,
    parts: Sequence[str],
    schedule: Schedule,
    folder: Path,
    trails: tuple[Trail, Trail],
    tick: Tick,
) -> dict[int, Trained]:
    """Heal every layer on all batches but the last `held`, a batch a step; a file a layer in `folder`.

    `student` and `streamed` are one model. What a killed run has done is not done again.
    """
    done: dict[int, Trained] = {}
    theirs, target = walk(teacher, batches, trail=trails[1]), None
    for step in walk(streamed, batches, tick, trails[0]):
        while target is None or target.index < step.index:
            target = next(theirs)
        target.run()
        done[step.index] = _layer(student, streamed, step, target, held, parts, schedule, folder)
    for _ in theirs:  # to the end, so that it lets go of what it holds
        pass
    told = {i: _told(folder, i) for i in range(len(streamed.layers))} | done
    if not any(of.steps for of in told.values()):
        mark(student, parts)  # says which parts there are
    return told


def _layer(
    student: Student,
    streamed: Streamed,
    step: Step,
    target: Step,
    held: int,
    parts: Sequence[str],
    schedule: Schedule,
    folder: Path,
) -> Trained:
    layer, i = step.layer, step.index
    if student.packed:
        thaw(layer)
    mark(student, parts, strict=False)

    def error(b: int) -> Float[Tensor, ""]:
        made, _ = step.calls[b][i](layer, *step.inputs.both(b))
        want = target.outputs[b].float()
        return (made.float() - want).square().mean() / want.square().mean().clamp(min=TINY)

    n = len(step.inputs)
    seen, unseen = list(range(n - held)), list(range(n - held, n))

    @torch.no_grad()
    def check() -> float:
        return float(torch.stack([error(b) for b in unseen]).mean())

    def loss(model: object, picked: Int[Tensor, "one one"]) -> Float[Tensor, ""]:
        return error(int(picked))

    numbers = torch.tensor(seen)[:, None]
    own = replace(schedule, batch=1, micro=0)
    inside = folder / f"steps-{i:04d}"
    rates = relative_rates(layer)
    prefix = f"{streamed.prefix}{i}."
    trained = Trained(None)  # of a layer that has none of the parts, such as a dense one
    if any(p.requires_grad for p in layer.parameters()):
        trained = train(
            layer, loss, numbers, own, check=check, folder=inside, rates=rates,
            stored=stored_as(student, prefix),
        )  # fmt: skip
    layer.requires_grad_(False)
    if student.packed:
        freeze(layer)
    state = {prefix + n: t for n, t in layer.state_dict().items()}
    packed = streamed.checkpoint.config["model_type"] == PACKED
    moved = state if packed else streamed.to_disk(state)
    known = streamed.checkpoint.tensors
    kept = {n: t.to(known[n].dtype).cpu().contiguous() for n, t in moved.items() if n in known}
    write_text(_file(folder, i).with_suffix(".json"), json.dumps(asdict(trained)) + "\n")
    save_whole(kept, _file(folder, i))
    shutil.rmtree(inside, ignore_errors=True)
    return trained


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:04d}.safetensors"


def _told(folder: Path, layer: int) -> Trained:
    said = parse_json(_file(folder, layer).with_suffix(".json").read_text(encoding="utf-8"))
    return Trained.from_dict(said)
