"""Training of a stock MoE model on text: routers alone first if wanted, then all of it.

    minimise   cross entropy of the next token + weight * balance (capacity.py), mean over MoE layers
    within     a capacity of each expert, if one is given

The training that Z-code M3 (Kim et al. 2021, arXiv:2109.10465) has after experts are aggregated or pruned,
and UNCURL (Sarkar et al. 2024, arXiv:2409.01483) after they are merged: routers, at random anew or as the
merging has left them, are trained alone, then everything. The state of the least held-out loss stays,
which is the cross entropy alone, with no pair left out, as the model will be run.

Differences from the papers:
- UNCURL does not say how many steps its routers have alone, Z-code M3's text was not at hand; both here
  have one schedule for either part, of `router_steps` and of the schedule's own. What routers have
  learnt is rounded as the checkpoint stores it before all is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError, RecipeError
from moecule.folder import HEALED
from moecule.hf import PACKED, skeleton
from moecule.journal import Journal, making, sweep
from moecule.moe import Moe, by_expert, find_layers, find_moe
from moecule.session import Compute, Progress, open_checkpoint, silent, ticker
from moecule.train.capacity import Capacity, Select, balancing, limiting
from moecule.train.lesson import (
    Lesson,
    history,
    lesson_windows,
    mean_of,
    noted,
    request_of,
    warn_of_stops,
    write_taught,
)
from moecule.train.loop import Loss, train
from moecule.train.losses import next_token
from moecule.train.moved import changes, stored_as
from moecule.train.schedule import Schedule, Trained
from moecule.train.shards import local
from moecule.train.student import Student, check_offload, check_plain, open_student, save_memory
from moecule.verbs import AUTO


@dataclass(frozen=True)
class Fitting:
    """How a model is trained on text."""

    lesson: Lesson = Lesson(("all",), Schedule(lr=3e-4))
    router_steps: int = 0  # in which routers alone move, before the lesson's
    new_routers: bool = False  # at random, as UNCURL has them
    balance: float = 0.01  # weight of the loss that evens experts
    capacity: float | None = None  # times its even share of the tokens an expert takes; None: all
    select: Select = "random"  # who is taken where there are more

    def __post_init__(self) -> None:
        """Raises RecipeError for what cannot be."""
        if self.lesson.by_layer:
            raise RecipeError("text is learnt by the whole model; leave out by_layer")
        if self.router_steps < 0:
            raise RecipeError(f"router_steps = {self.router_steps}, wanted 0 or more")
        if not 0 <= self.balance < float("inf"):
            raise RecipeError(f"balance = {self.balance:g}, wanted 0 or more")
        if self.capacity is not None:
            Capacity(1, self.capacity, self.select)  # raises where it cannot be


@dataclass(frozen=True)
class Fitted:
    """What fit leaves."""

    folder: Path
    trained: Mapping[str, Trained]  # "router", "all": what of it there was
    left_out: float  # share of the (token, expert) pairs that found no room


DEFAULT = Fitting()
LEFT_OUT = "left_out"  # in config.json


def fit(
    model: str | Path,
    out: str | Path,
    *,
    fitting: Fitting = DEFAULT,
    data: str | Path | None = None,
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> Fitted:
    """Train a stock checkpoint on text; one of the same kind in `out`, no worse on what is held out.

    With new routers: no worse than the model is with those.

    Does nothing where `out` holds just that; goes on where a killed run of the same stopped.
    Raises CheckpointError for a packed model, DataError for text of which nothing is left to hold out,
    RecipeError for parts that do not move or too little memory, OutputError where `out` holds other
    things. Warns where the loss diverged; the best is kept then.
    """
    out, ranks, lesson = Path(out), compute.ranks, fitting.lesson
    checkpoint = open_checkpoint(model)
    if checkpoint.config["model_type"] == PACKED:
        raise CheckpointError(
            f"{checkpoint.path} is packed; train the model it was made of, or moecule heal it"
        )
    check_plain(checkpoint)
    if lesson.offload:
        check_offload(compute)
    windows, held = lesson_windows(checkpoint, data, lesson, ranks.size)
    request = request_of(
        ranks.size, windows, held, verb="train", digests=[checkpoint.digest], **asdict(fitting)
    )
    if ranks.share(noted(out) == request, 0):
        sweep(out, ranks, whole=True)
        return _told(out)
    with making(out, request, ranks) as journal:
        if not journal.is_written:
            journal.add({"began": True})  # what follows leaves files of its own
            _stages(checkpoint, fitting, request, windows, held, compute, journal, progress)
    warn_of_stops(out)
    return _told(out)


def _told(out: Path) -> Fitted:
    said = open_checkpoint(out).config["moecule"]
    return Fitted(out, history(out), said[LEFT_OUT])


def _stages(
    checkpoint: Checkpoint,
    fitting: Fitting,
    request: Mapping[str, Any],
    windows: Int[Tensor, "N S"],
    held: Int[Tensor, "M S"],
    compute: Compute,
    journal: Journal,
    progress: Progress,
) -> None:
    """Routers alone, then all: each opens what the one before has written; the last one is to stay."""
    lesson = fitting.lesson
    stages = {"all": (lesson.parts or ("all",), lesson.schedule)}
    if fitting.router_steps:
        alone = replace(lesson.schedule, steps=fitting.router_steps)
        stages = {"router": (("router",), alone), **stages}
    steps = sum(schedule.steps for _, schedule in stages.values())
    text = steps * lesson.schedule.batch * windows.shape[1]
    tick = ticker(progress, "train", steps, text)
    source, trained = checkpoint, dict[str, Trained]()
    for name, (parts, schedule) in stages.items():
        made = journal.made if name == "all" else journal.folder / name
        if {"stage": name} not in journal.entries:
            student = open_student(
                source.path, compute, parts=parts, experts_over=lesson.experts_over,
                offload=lesson.offload,
            )  # fmt: skip
            if lesson.checkpointing:
                save_memory(student)
            if fitting.new_routers and source is checkpoint:
                renew_routers(student, schedule.seed)
            steps_of = journal.folder / f"{name}-steps"
            trained[name], left_out = _train(
                student, fitting, schedule, windows, held, steps_of, tick
            )
            moved = changes(student)
            del student  # the next stage opens its own
            if compute.ranks.is_first:
                noted = {HEALED: request, LEFT_OUT: left_out}
                write_taught(source, moved, made, noted, trained)
            journal.add({"stage": name})  # waits for all
        else:
            for _ in range(schedule.steps):
                tick()
        source, trained = open_checkpoint(made), history(made)


def _train(
    student: Student,
    fitting: Fitting,
    schedule: Schedule,
    windows: Int[Tensor, "N S"],
    held: Int[Tensor, "M S"],
    folder: Path,
    tick: Callable[[], None],
) -> tuple[Trained, float]:
    """(what came of it, the share of held-out pairs that then find no room)."""
    ranks = student.compute.ranks
    with learning(student, fitting) as (loss, rules):

        @torch.no_grad()
        def check() -> float:
            return mean_of(lambda ids: plain_loss(student, ids), held, ranks)

        trained = train(
            student.model,
            loss,
            windows,
            schedule,
            check=check,
            stored=stored_as(student),
            device=student.compute.torch_device(),
            folder=folder,
            ranks=ranks,
            tick=tick,
        )
        return trained, _left_out(student, rules, held, schedule)


def plain_loss(student: Student, ids: Int[Tensor, "B S"]) -> Float[Tensor, ""]:
    """Cross entropy of the next token, nats."""
    ids = ids.to(student.compute.torch_device())
    return next_token(student.model(input_ids=ids, use_cache=False).logits, ids)


@contextmanager
def learning(student: Student, fitting: Fitting) -> Iterator[tuple[Loss, list[Capacity]]]:
    """(what is minimised, the capacities of MoE layers), while it lasts."""
    moes, experts = _moes(student)
    with ExitStack() as stack:
        rules: list[Capacity] = []
        if fitting.capacity is not None:
            limits = limiting(moes, experts, fitting.capacity, fitting.select)
            rules = stack.enter_context(limits)
        if fitting.balance == 0:
            yield (lambda model, ids: plain_loss(student, ids)), rules
            return
        scores = student.family.scores_in(student.model.config.get_text_config())
        told = stack.enter_context(balancing(moes, experts, scores))

        def loss(model: Any, ids: Int[Tensor, "B S"]) -> Float[Tensor, ""]:
            told.terms.clear()  # of layers that were computed again on the way back
            return plain_loss(student, ids) + fitting.balance * told.take()

        yield loss, rules


def _moes(student: Student) -> tuple[list[Moe], int]:
    """(the MoE blocks, experts of each over all processes)."""
    net, family = skeleton(student.checkpoint, torch.float32)  # a shared one counts its own experts
    found = [
        [moe for layer in find_layers(model)[1] if (moe := find_moe(layer, family))]
        for model in (student.model, net)
    ]
    return found[0], found[1][0].experts.num_experts


@torch.no_grad()
def renew_routers(student: Student, seed: int) -> None:
    """Rows of routers at random, as the family begins them, and their biases 0."""
    moes, experts = _moes(student)
    names = {id(p): n for n, p in student.model.named_parameters()}
    lot = torch.Generator().manual_seed(seed)
    width = student.model.config.get_text_config().initializer_range
    for moe in moes:
        for name, tensor in _rows(moe, experts):
            fresh = torch.zeros(tensor.shape)
            if name == "weight":
                fresh.normal_(0, width, generator=lot)
            stored = student.dtypes[names[id(tensor)]]
            fresh = fresh.to(stored).to(tensor.dtype)  # rounded as it will be
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh  # shards may lie on the host
                fresh = distribute_tensor(fresh.to(mesh.device_type), mesh, tensor.placements)
            local(tensor).copy_(local(fresh))


def _rows(moe: Moe, experts: int) -> Iterator[tuple[str, Tensor]]:
    """What makes the logits; a bias for the choice alone does not."""
    for module, name, _ in by_expert(moe, experts):
        if name in ("weight", "bias"):
            yield name, getattr(module, name)


def _left_out(
    student: Student, rules: list[Capacity], held: Int[Tensor, "M S"], schedule: Schedule
) -> float:
    """Of held-out pairs, batched as in training, what finds no room; 0 without a capacity."""
    if not rules:
        return 0.0
    ranks = student.compute.ranks
    for rule in rules:
        rule.forget()
    mine = torch.stack(ranks.mine(list(held)))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(schedule.seed)
        for part in mine.split(schedule.micro or max(1, schedule.batch // ranks.size)):
            plain_loss(student, part)
    counts = [sum(int(rule.left_out) for rule in rules), sum(rule.pairs for rule in rules)]
    gone, of = ranks.add_up(torch.tensor(counts, dtype=torch.float64)).tolist()
    return float(gone / of)
