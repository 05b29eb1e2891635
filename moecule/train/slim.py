"""SlimMoE: narrower experts, and fewer groups of attention heads, in stages of cutting and distilling.

Li et al., "SlimMoE: Structured Compression of Large MoE Models via Expert Slimming and Distillation",
2025, arXiv:2506.18349.

    for stage s of S:   score channels (and groups, in the last stage) of S_{s-1} on text
                        S_s = S_{s-1} with those of the highest scores alone, as many of every expert
                        minimise over S_s   KL(teacher || S_s)     all weights, routers too

Every expert and the router stay; the teacher is the original in all stages. Scores are in
methods/slimmoe.py and sensitivity.py, distilling is heal.py's. What comes out is a stock checkpoint.

Differences from the paper, whose text was not at hand:
- How many stages, which widths in between, how long each and at which rates is not known to us. Ours:
  widths fall by the same factor from stage to stage (in multiples of `multiple`), every stage but the
  last takes a tenth of the steps, and only in the last does the rate fall (experiments/slimmoe).
- The first stage scores by `signal`, for there the model is its own teacher; later ones by the 8 likeliest.
- The best by held-out KL of each stage goes on, not the last.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moecule.batch import digest
from moecule.checkpoint import Checkpoint
from moecule.errors import DataError, OutputError, RecipeError
from moecule.files import parse_json, write_text
from moecule.hf import PACKED, skeleton
from moecule.journal import making, only_one, sweep
from moecule.session import (
    Compute,
    Progress,
    open_checkpoint,
    silent,
    stream,
    ticker,
)
from moecule.train.cut import cut, slim_keys, width_of
from moecule.train.heal import teach
from moecule.train.lesson import (
    Lesson,
    check_teacher,
    history,
    lesson_windows,
    noted,
    request_of,
)
from moecule.train.loop import check_batch
from moecule.train.room import check_scored
from moecule.train.schedule import Trained
from moecule.train.sensitivity import Felt, feel
from moecule.train.stages import Slimming, Stage, stages_of
from moecule.train.student import check_offload, check_plain, check_shared, open_teacher
from moecule.verbs import AUTO
from moecule.writer import check_out, move_into

SLIM = "slim"  # in config.json: the request of which the checkpoint is a stage
MOVING = ".moving.partial"  # names of what is being put in place


@dataclass(frozen=True)
class Slimmed:
    """What slim leaves."""

    folder: Path
    stages: tuple[Stage, ...]
    trained: tuple[Mapping[str, Trained], ...]  # a stage each, as heal has it


DEFAULT = Lesson()


def slim(
    model: str | Path,
    out: str | Path,
    slimming: Slimming,
    *,
    lesson: Lesson = DEFAULT,
    teacher: str | Path | None = None,
    data: str | Path | None = None,
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> Slimmed:
    """Narrow the model's experts stage by stage; a stock checkpoint in `out`.

    The lesson's steps are those of all stages. `teacher`: another than the model itself. Each stage but
    the last stays in `out/stage_N`; a killed run goes on.
    Raises RecipeError for what the config cannot say, or too little memory to score in; CheckpointError
    for a teacher of another vocabulary; OutputError where `out` holds other things; what `heal` raises.
    """
    teacher = model if teacher is None else teacher
    checkpoint = open_checkpoint(model)
    ranks, out, theirs = compute.ranks, Path(out), open_checkpoint(teacher)
    stages = check_slimming(checkpoint, slimming, lesson, ranks.size)
    if lesson.offload:
        check_offload(compute)
    check_teacher(checkpoint, teacher)
    windows, held = lesson_windows(checkpoint, data, lesson, ranks.size)
    request = request_of(
        ranks.size, windows, held,
        digests=[checkpoint.digest, theirs.digest],
        dtype=str(compute.torch_dtype(theirs.config)),  # in which it speaks, and all is scored
        slimming=asdict(slimming),
        lesson=asdict(lesson),
    )  # fmt: skip
    job = _Job(checkpoint, teacher, out, stages, request, slimming, lesson, compute, progress)
    shares = _shares(windows, stages)
    done = ranks.share(noted(out, SLIM) if ranks.is_first else None, 0)
    if done is None:
        with only_one(out, ranks):
            _run(job, shares, held)
    elif done != job.note(len(stages) - 1) or not _taught_on(out, shares[-1]):
        raise OutputError(
            f"{out} holds what another request made; name another folder or remove it"
        )
    elif ranks.is_first:
        (out / MOVING).unlink(missing_ok=True)  # a kill at the very end left it
    folders = [*(job.stage(s) for s in range(len(stages) - 1)), out]
    # stages may be thrown away once the last is there
    return Slimmed(out, stages, tuple(history(f) if f.is_dir() else {} for f in folders))


def check_slimming(
    checkpoint: Checkpoint, slimming: Slimming, lesson: Lesson, size: int
) -> tuple[Stage, ...]:
    """The stages. Raises RecipeError where one cannot be, nothing would go, or `size` processes cannot."""
    net, family = skeleton(checkpoint, torch.float32)
    packed = checkpoint.config["model_type"] == PACKED
    check_plain(checkpoint)
    check_shared(
        checkpoint, net, family, size, lesson.experts_over, packed=packed, offload=lesson.offload
    )
    check_batch(lesson.schedule, size)
    stages = stages_of(slimming, width_of(net), lesson.schedule.steps)
    keys = [slim_keys(net, stage.width, stage.groups) for stage in stages]
    if not keys[-1]:
        raise RecipeError("width and groups are what the model has; give less of either")
    return stages


def _taught_on(out: Path, share: Int[Tensor, "N S"]) -> bool:
    """Whether the checkpoint in `out` learnt on these windows last, and not again afterwards."""
    last = noted(out)
    return last is not None and last["verb"] == "heal" and last["tokens"][0] == digest([share])


@dataclass(frozen=True)
class _Job:
    """What is asked, and where it is made."""

    checkpoint: Checkpoint
    teacher: str | Path
    out: Path
    stages: tuple[Stage, ...]
    request: Mapping[str, Any]
    slimming: Slimming
    lesson: Lesson
    compute: Compute
    progress: Progress

    def stage(self, s: int) -> Path:
        """Where the checkpoint of stage s is made."""
        return self.out / f"stage_{s + 1}"

    def cut(self, s: int) -> Path:
        """Where what it begins with is made."""
        return self.out / f"cut_{s + 1}"

    def note(self, s: int) -> dict[str, Any]:
        """What the config of a checkpoint of stage s says of it."""
        return {**self.request, "stage": s + 1}


def _shares(windows: Int[Tensor, "N S"], stages: tuple[Stage, ...]) -> list[Int[Tensor, "_N S"]]:
    """Windows for each stage, as its steps have it; none is in two."""
    total, n = sum(stage.steps for stage in stages), len(windows)
    ends = [0]
    for stage in stages:
        ends.append(ends[-1] + stage.steps)
    cuts = [n * end // total for end in ends]
    if any(a == b for a, b in pairwise(cuts)):
        raise DataError(f"the text gives {n} windows for {len(stages)} stages; give more text")
    return [windows[a:b] for a, b in pairwise(cuts)]


def _run(job: _Job, shares: list[Int[Tensor, "_N S"]], held: Int[Tensor, "M S"]) -> None:
    """All stages that are not done, and the last one's checkpoint put in place."""
    out, ranks, last = job.out, job.compute.ranks, len(job.stages) - 1
    names = [f.name for s in range(last + 1) for f in (job.stage(s), job.cut(s))]
    moving = ranks.share(_moving(job, last) if ranks.is_first else [], 0)
    if ranks.is_first:
        check_out(out, {*names, *moving})
    for s, share in enumerate(shares if not moving else ()):
        folder, found = job.stage(s), noted(job.stage(s), SLIM)
        if found not in (None, job.note(s)):
            raise OutputError(
                f"{folder} holds what another request made; name another folder or remove it"
            )
        if found is None:
            scored = torch.cat([*shares[s:], *shares[:s]])[: job.slimming.samples]
            _cut(job, s, job.stage(s - 1) if s else job.checkpoint.path, scored)
            schedule = replace(job.lesson.schedule, steps=job.stages[s].steps)
            if s < last:  # more is to be cut: the rate stays high
                schedule = replace(schedule, end=1.0)
            teach(
                open_checkpoint(job.cut(s)), job.teacher, folder, share, held,
                lesson=replace(job.lesson, schedule=schedule), compute=job.compute,
                progress=_named(job.progress, f"stage {s + 1}"),
            )  # fmt: skip
        ranks.wait()
        if ranks.is_first:
            shutil.rmtree(job.cut(s), ignore_errors=True)
    if ranks.is_first:
        _move_up(job, last, moving)
    ranks.wait()


def _named(progress: Progress, stage: str) -> Progress:
    return lambda what, done, of, tokens: progress(f"{stage}: {what}", done, of, tokens)


def _moving(job: _Job, last: int) -> list[str]:
    """Names of what a killed run was putting in place. Raises OutputError for another request's."""
    file = job.out / MOVING
    if not file.is_file():
        return []
    said = parse_json(file.read_text(encoding="utf-8"))
    if said["note"] != job.note(last):
        raise OutputError(
            f"{job.out} holds what another request was putting in place; run that again, or name another"
        )
    return list(said["names"])


def _move_up(job: _Job, last: int, moving: list[str]) -> None:
    """The last stage is what was asked for. May be called again after a kill."""
    made, out = job.stage(last), job.out
    if not moving:
        names = sorted(f.name for f in made.iterdir())
        write_text(out / MOVING, json.dumps({"note": job.note(last), "names": names}) + "\n")
    if made.is_dir():
        move_into(made, out)
        made.rmdir()
    (out / MOVING).unlink()


def _cut(job: _Job, s: int, source: Path, windows: Int[Tensor, "N S"]) -> None:
    """Score, and write what stage s begins with; nothing where it is there already."""
    folder, ranks, stage = job.cut(s), job.compute.ranks, job.stages[s]
    if ranks.share((folder / "config.json").is_file(), 0):
        if open_checkpoint(folder).config.get("moecule", {}).get(SLIM) == job.note(s):
            sweep(folder, ranks, whole=True)
            return
        ranks.wait()  # all have seen that it is another request's, which is thrown away
        if ranks.is_first and SLIM in open_checkpoint(folder).config.get("moecule", {}):
            shutil.rmtree(folder)
    ranks.wait()
    with making(folder, job.note(s), ranks) as journal:
        if not journal.is_written:
            felt = _felt(job, s, source, windows)
            if ranks.is_first:
                made = journal.made
                shutil.rmtree(made, ignore_errors=True)
                streamed = stream(source, replace(job.compute, device="cpu", dtype="float32"))
                groups = {} if stage.groups is None else felt.groups_kept(stage.groups)
                cut(streamed, felt.channels_kept(stage.width), groups, made, {SLIM: job.note(s)})


def _felt(job: _Job, s: int, source: Path, windows: Int[Tensor, "N S"]) -> Felt:
    """Scores of what stage s begins from. Raises RecipeError where gradients have no room."""
    slimming, compute = job.slimming, job.compute
    own = open_checkpoint(source).digest == open_checkpoint(job.teacher).digest
    check_scored([source] if own else [source, job.teacher], compute)
    model = open_teacher(source, compute)
    theirs = model if own else open_teacher(job.teacher, compute)
    batches = list(windows.split(slimming.batch))
    size = compute.ranks.size
    if len(batches) < size:
        raise DataError(
            f"{size} processes share {len(batches)} batches of {slimming.batch} windows to score on; start "
            "fewer, or give smaller batches"
        )
    tick = ticker(job.progress, f"stage {s + 1}: score", len(batches))
    felt = feel(
        model, theirs, batches, slimming.signal if s == 0 else "topk_ce", full=slimming.full,
        groups=job.stages[s].groups is not None, ranks=compute.ranks, tick=tick,
    )  # fmt: skip
    if felt.starved:
        warnings.warn(
            f"stage {s + 1}: no gradient reached {felt.starved} experts, of which the first channels stay; "
            "score on more text (--samples)",
            stacklevel=2,
        )
    return felt
