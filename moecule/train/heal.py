"""heal: a compressed model is taught what the original says, with whatever of it can still move.

    minimise over what moves   KL(teacher || student), mean over the tokens of the training text

The teacher runs beside the student, or has said its k likeliest tokens once, layer by layer, and
need not fit. The best by the KL on held-out text stays, so healing never leaves a model worse by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moecule.checkpoint import Checkpoint
from moecule.errors import RecipeError
from moecule.files import writing
from moecule.folder import HEALED
from moecule.hf import PACKED
from moecule.journal import Journal, making, sweep
from moecule.ranks import SOLO
from moecule.session import (
    Compute,
    Progress,
    noting,
    open_checkpoint,
    silent,
    stream_any,
    ticker,
    trail_of,
)
from moecule.train.by_layer import heal_layers
from moecule.train.lesson import (
    TOGETHER,
    Lesson,
    check_teacher,
    history,
    lesson_windows,
    mean_of,
    noted,
    request_of,
    warn_of_stops,
    write_taught,
)
from moecule.train.loop import Loss, train
from moecule.train.losses import distil, distil_top_k
from moecule.train.moved import Shelf, changes, stored_as
from moecule.train.room import fits_beside
from moecule.train.schedule import Trained
from moecule.train.student import (
    Student,
    check_offload,
    check_plain,
    open_student,
    open_teacher,
    relative_rates,
    save_memory,
)
from moecule.train.teacher import Said, say
from moecule.verbs import AUTO


@dataclass(frozen=True)
class Healed:
    """What heal leaves."""

    folder: Path
    trained: Mapping[str, Trained]  # "all", or by layer


DEFAULT = Lesson()


def heal(
    model: str | Path,
    teacher: str | Path,
    out: str | Path,
    *,
    lesson: Lesson = DEFAULT,
    data: str | Path | None = None,
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> Healed:
    """Train what of `model` can move to say what `teacher` says; a checkpoint of the same kind in `out`.

    Does nothing where `out` holds just that; goes on where a killed run of the same stopped.
    Raises CheckpointError for a teacher of another vocabulary, DataError for text of which nothing is
    left to hold out, RecipeError for parts that do not move or too little memory, OutputError where
    `out` holds other things. Warns where the loss diverged; the best is kept then.
    """
    checkpoint = open_checkpoint(model)
    check_teacher(checkpoint, teacher)
    windows, held = lesson_windows(checkpoint, data, lesson, compute.ranks.size)
    return teach(
        checkpoint,
        teacher,
        Path(out),
        windows,
        held,
        lesson=lesson,
        compute=compute,
        progress=progress,
    )


def teach(
    checkpoint: Checkpoint,
    teacher: str | Path,
    out: Path,
    windows: Int[Tensor, "N S"],
    held: Int[Tensor, "M S"],
    *,
    lesson: Lesson = DEFAULT,
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> Healed:
    """`heal` on windows that are given; those `held` out say which state is best."""
    ranks, theirs = compute.ranks, open_checkpoint(teacher)
    check_plain(checkpoint)
    packed = checkpoint.config["model_type"] == PACKED
    parts = lesson.parts or (("scales", "router", "norms") if packed else ("all",))
    if lesson.offload:
        check_offload(compute)
    request = request_of(
        ranks.size, windows, held,
        verb="heal",
        digests=[checkpoint.digest, theirs.digest],
        dtype=str(compute.torch_dtype(theirs.config)),  # in which it speaks
        **asdict(lesson) | {"parts": parts},
    )  # fmt: skip
    if ranks.share(noted(out) == request, 0):
        sweep(out, ranks, whole=True)
        return Healed(out, history(out))
    with making(out, request, ranks) as journal:
        if not journal.is_written:
            journal.add({"began": True})  # what follows leaves files of its own
            if lesson.by_layer:
                trained, moved = _by_layer(
                    checkpoint, teacher, lesson, parts, windows, held, compute, journal, progress
                )
            else:
                trained, moved = _whole(
                    checkpoint, teacher, lesson, parts, windows, held, compute, journal, progress
                )
            if ranks.is_first:
                write_taught(checkpoint, moved, journal.made, {HEALED: request}, trained)
    warn_of_stops(out)
    return Healed(out, history(out))


def _whole(
    checkpoint: Checkpoint,
    teacher: str | Path,
    lesson: Lesson,
    parts: Sequence[str],
    windows: Int[Tensor, "N S"],
    held: Int[Tensor, "M S"],
    compute: Compute,
    journal: Journal,
    progress: Progress,
) -> tuple[dict[str, Trained], dict[str, Tensor]]:
    """(what came of it, tensors that moved by their names on disk)."""
    packed = checkpoint.config["model_type"] == PACKED
    theirs, said = _teacher(
        teacher, lesson, windows, held, compute, journal, progress, packed=packed
    )
    student = open_student(
        checkpoint.path,
        compute,
        parts=parts,
        experts_over=lesson.experts_over,
        offload=lesson.offload,
    )
    if lesson.checkpointing:
        save_memory(student)
    # the first column numbers a window, for what the teacher has said of it
    numbers = torch.arange(len(windows) + len(held))[:, None]
    every = torch.cat([numbers, torch.cat([windows, held])], 1)
    loss = _loss(theirs, said)
    ranks, n = compute.ranks, len(windows)

    @torch.no_grad()
    def check() -> float:
        device = compute.torch_device()
        return mean_of(lambda ids: loss(student.model, ids.to(device)), every[n:], ranks)

    schedule = lesson.schedule
    text = schedule.steps * schedule.batch * windows.shape[1]
    tick = ticker(progress, "heal", schedule.steps, text)
    trained = train(
        student.model,
        loss,
        every[:n],
        schedule,
        check=check,
        folder=journal.folder / "steps",
        ranks=ranks,
        rates=relative_rates(student.model),
        stored=stored_as(student),
        device=compute.torch_device(),
        tick=tick,
    )
    return {"all": trained}, changes(student)


def _teacher(
    teacher: str | Path,
    lesson: Lesson,
    windows: Int[Tensor, "N S"],
    held: Int[Tensor, "M S"],
    compute: Compute,
    journal: Journal,
    progress: Progress,
    *,
    packed: bool,
) -> tuple[Any, Said | None]:
    """(the teacher loaded, None), or (None, what it has said). `packed`: so is who learns."""
    streamed = stream_any(teacher, compute)
    known = int(streamed.model.config.get_text_config().vocab_size)
    if lesson.top_k > known:
        raise RecipeError(
            f"top_k = {lesson.top_k}, and the teacher knows {known} tokens; give fewer"
        )
    teaching = lesson.teaching
    if teaching == "auto":  # a run that goes on is taught as it began
        noted = [e["teaching"] for e in journal.entries if "teaching" in e]
        room = fits_beside(streamed, compute, offload=lesson.offload, packed=packed)
        teaching = noted[0] if noted else compute.ranks.share("beside" if room else "said", 0)
        if not noted:
            journal.add({"teaching": teaching})
    if teaching == "beside":
        del streamed
        return open_teacher(teacher, compute), None
    every, folder = torch.cat([windows, held]), journal.folder / "said"
    if compute.ranks.is_first:
        alone = Compute(compute.device, compute.dtype, compute.trust_remote_code, compute.states)
        trail = noting(
            trail_of(streamed, every.numel(), alone, 3, journal.folder), journal, "said_"
        )
        tick = ticker(progress, "teacher", len(streamed.layers), every.numel())
        all_ranks, journal.ranks = journal.ranks, SOLO  # the others wait below, not for its notes
        say(streamed, every, folder, lesson.top_k, TOGETHER, tick, trail)
        journal.ranks = all_ranks
    compute.ranks.wait()
    return None, Said(folder, TOGETHER)


def _loss(teacher: Any, said: Said | None) -> Loss:
    """KL(teacher || student) of windows whose first column is their number."""

    def live(model: Any, windows: Int[Tensor, "B S1"]) -> Float[Tensor, ""]:
        ids = windows[:, 1:]
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits
        return distil(model(input_ids=ids, use_cache=False).logits, wanted)

    def kept(model: Any, windows: Int[Tensor, "B S1"]) -> Float[Tensor, ""]:
        assert said is not None  # there is a teacher otherwise
        ids, logp = said.of(windows[:, 0].tolist(), windows.device)
        return distil_top_k(model(input_ids=windows[:, 1:], use_cache=False).logits, ids, logp)

    return live if said is None else kept


def _by_layer(
    checkpoint: Checkpoint,
    teacher: str | Path,
    lesson: Lesson,
    parts: Sequence[str],
    windows: Int[Tensor, "N S"],
    held: Int[Tensor, "M S"],
    compute: Compute,
    journal: Journal,
    progress: Progress,
) -> tuple[dict[str, Trained], Mapping[str, Tensor]]:
    """(what came of each layer, tensors that moved by their names on disk)."""
    if compute.ranks.size > 1:
        raise RecipeError("layers are healed by one process; start one, or leave out --by-layer")
    compute = replace(compute, dtype="float32")
    streamed, theirs = stream_any(checkpoint.path, compute), stream_any(teacher, compute)
    packed = checkpoint.config["model_type"] == PACKED
    disk, dtypes = streamed.disk, streamed.dtypes
    student = Student(streamed.model, checkpoint, streamed.family, compute, packed, disk, dtypes)
    each = lesson.schedule.micro or lesson.schedule.batch
    seen, unseen = windows.split(each), held.split(each)
    batches, tokens = [*seen, *unseen], windows.numel() + held.numel()
    trails = [
        noting(trail_of(m, tokens, compute, 6, journal.folder), journal, of)
        for m, of in ((streamed, ""), (theirs, "teacher_"))
    ]
    tick = ticker(progress, "heal by layer", len(streamed.layers), tokens)
    folder = journal.folder / "layers"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    done = heal_layers(
        student, streamed, theirs, batches, len(unseen), parts, lesson.schedule, folder,
        (trails[0], trails[1]), tick,
    )  # fmt: skip
    return {f"layer {i}": t for i, t in done.items()}, Shelf.of(folder)
