"""Masks are learnt (methods/otp.py): the heads of a compressed checkpoint, all else as it is.

    teacher: the model itself, all experts running     student: the same, with masks that are drawn
    loss   KL(teacher || student) + (price + STIFF * gap) * keep;  the price climbs with the gap
    keep   the share of pairs that run;  gap: how far it is above the share wanted

Weights are shared: the model runs twice, once without gradient. The held-out figure by which the
best state is kept is the KL of hard masks that run the share wanted: one number, added for all
layers to the score of every further expert, brings them there, and becomes part of the heads.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from moecule.chat import is_chat
from moecule.checkpoint import Checkpoint
from moecule.data import Sampling, check_tokens, read_texts, split_windows, window_length
from moecule.decode import QUANTISED
from moecule.errors import CheckpointError, DataError
from moecule.family import load_family
from moecule.files import parse_json, write_text
from moecule.folder import LEARNT
from moecule.hf import PACKED, skeleton
from moecule.journal import journal_of, sweep
from moecule.learnt import learner, named, put_heads
from moecule.methods import otp
from moecule.moe import find_layers, find_moe
from moecule.order import read_plan
from moecule.plan import Masks
from moecule.session import (
    ASSETS,
    Compute,
    Progress,
    load,
    open_checkpoint,
    silent,
    ticker,
    tokenizer_of,
)
from moecule.text import HELD_OUT
from moecule.train.lesson import request_of
from moecule.train.loop import train
from moecule.train.masked import Pupil, Settled, loss_of, settle
from moecule.train.room import check_unpacked
from moecule.train.schedule import Schedule, Trained
from moecule.verbs import AUTO, DEFAULT_SAMPLING

BESIDE = "masks"  # in the folder: what a killed run goes on from lies beside this name
CHECKED = 64  # windows on which hard masks are brought to the share wanted
BELOW = 0.005  # the share aimed at is so much less than the one wanted, for other text differs
OFF = 0.01  # from the share wanted, at most
PRICE_RATE = 0.01  # nats a step, at most, by which the price moves
BIAS_RATE = (
    10.0  # times the rate: by it alone heads leave the mask of all experts, where they begin
)
CHECKS = 8  # held-out figures on the way
LOGITS = 2**28  # numbers that a model gives at once, at most


@dataclass(frozen=True)
class Learnt:
    """What learning leaves in the folder."""

    folder: Path
    keep: float  # share of pairs that the hard masks run, on windows that were not learnt from
    kl_nats: float  # on them, a token, to all experts running
    trained: Trained


def learn_masks(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> Learnt:
    """Teach a checkpoint, in place, which pairs of token and expert it may leave out, as its plan asks.

    The last windows of the text, on which `evaluate` measures, are left alone. Does nothing where the
    folder holds just that; goes on where a killed run of the same stopped.
    Raises PlanError or CheckpointError for a checkpoint without a place for masks, DataError for too
    little text or conversations, RecipeError for too little memory. Warns where the loss diverged, or
    the share wanted was not come to.
    """
    folder, ranks = Path(folder), compute.ranks
    checkpoint, masks = _opened(folder)
    options: otp.Options = learner(masks)[1].options
    seen, held = learning_windows(checkpoint, data, options, sampling)
    if len(held) < ranks.size:
        raise DataError(
            f"{ranks.size} processes share {len(held)} windows that masks are checked on; start fewer, or "
            "give more text"
        )
    noted = dict(checkpoint.config["moecule"])
    earlier = noted.pop(LEARNT, None)
    # `noted`: what the model was made of, and what became of it since
    request = request_of(ranks.size, seen, held, verb="learn", noted=noted, how=dict(masks.how))
    beside = folder / BESIDE
    if earlier is not None and earlier["request"] == request:
        sweep(beside, ranks, whole=True)
        return _learnt(folder, earlier)
    with journal_of(beside, request, ranks) as journal:
        if not journal.entries:
            journal.add({"began": True})  # what follows leaves files of its own
        trained, settled, heads = _taught(
            checkpoint, options, (seen, held), compute, journal.folder / "steps", progress
        )
        learnt = Learnt(folder, settled.keep, settled.kl_nats, trained)
        if ranks.is_first:
            _write(learnt, heads, request)
        ranks.wait()
        journal.remove()
    _warn(learnt, options)
    return learnt


def _opened(folder: Path) -> tuple[Checkpoint, Masks]:
    """What is to learn. Raises CheckpointError where there is no place for masks."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.config["model_type"] != PACKED:
        raise CheckpointError(
            f"{folder} is a stock checkpoint, and masks are part of one that moecule packed; apply a plan "
            "with learnt masks (recipe mc_sharp) first"
        )
    masks = read_plan(folder / "plan.yaml").skip
    if not isinstance(masks, Masks):
        raise CheckpointError(
            f"{folder} was made by a plan without learnt masks; compress with recipe mc_sharp"
        )
    noted = checkpoint.config[QUANTISED]["skip"]
    if noted != json.loads(json.dumps(masks.settings())):
        raise CheckpointError(
            f"{folder / 'plan.yaml'} says {masks.settings()} of masks, and the checkpoint has {noted}; "
            "apply the plan anew"
        )
    return checkpoint, masks


def _write(learnt: Learnt, heads: Mapping[str, Tensor], request: Mapping[str, Any]) -> None:
    """The heads, then config.json, which says that they have learnt."""
    folder = learnt.folder
    put_heads(folder, heads)
    found = {"keep": learnt.keep, "kl_nats": learnt.kl_nats, "trained": asdict(learnt.trained)}
    config = dict(parse_json((folder / "config.json").read_text(encoding="utf-8")))
    config["moecule"] = {**config["moecule"], LEARNT: {"request": dict(request), **found}}
    for stale in ("result.json", "report.html", "report.md"):  # of what it was before
        (folder / stale).unlink(missing_ok=True)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _learnt(folder: Path, said: Mapping[str, Any]) -> Learnt:
    return Learnt(folder, said["keep"], said["kl_nats"], Trained.from_dict(said["trained"]))


def _warn(learnt: Learnt, options: otp.Options) -> None:
    if learnt.trained.stopped is not None:
        warnings.warn(f"{learnt.trained.stopped}; the best before it was kept", stacklevel=3)
    if abs(learnt.keep - options.keep) > OFF:
        warnings.warn(
            f"the masks run {100 * learnt.keep:.1f} % of the pairs, wanted {100 * options.keep:g} %; give "
            "more steps (--set skip.steps)",
            stacklevel=3,
        )


def check_text(file: str | Path) -> None:
    """Raise DataError for conversations, from which no masks are learnt."""
    if is_chat(file):
        raise DataError(f"masks are learnt from text, and {file} holds conversations; give --data")


def learning_windows(
    checkpoint: Checkpoint, data: str | Path | None, options: otp.Options, sampling: Sampling
) -> tuple[Int[Tensor, "N S"], Int[Tensor, "M S"]]:
    """(windows to learn from, those on which hard masks are checked).

    Raises DataError for conversations, and for text that gives not two windows besides those on which
    `evaluate` measures.
    """
    file = data or ASSETS / "text" / "calibration.jsonl"
    check_text(file)
    config = skeleton(checkpoint, torch.float32)[0].config
    length = window_length(config, sampling.length)
    wanted = Sampling(options.samples + CHECKED, seed=sampling.seed)
    texts, tokenizer = read_texts(file), tokenizer_of(checkpoint.path)
    windows, _ = split_windows(tokenizer, texts, wanted, length, HELD_OUT)
    check_tokens(windows, config)
    checked = min(CHECKED, len(windows) // 2)
    if not checked:
        raise DataError(
            f"{file} leaves {len(windows)} windows of {length} tokens to learn masks from; give more text"
        )
    return windows[:-checked], windows[-checked:]


def _taught(
    checkpoint: Checkpoint,
    options: otp.Options,
    windows: tuple[Int[Tensor, "N S"], Int[Tensor, "M S"]],
    compute: Compute,
    steps: Path,
    progress: Progress,
) -> tuple[Trained, Settled, dict[str, Tensor]]:
    """(what came of it, the hard masks, heads by their names in the checkpoint)."""
    (seen, held), ranks = windows, compute.ranks
    compute = Compute(compute.device, "float32", compute.trust_remote_code, ranks=ranks)
    check_unpacked(checkpoint, compute)
    family = load_family(checkpoint.config["moecule"]["model_type"])
    model = load(checkpoint.path, compute)
    prefix, layers = find_layers(model)
    moes = {i: m for i, layer in enumerate(layers) if (m := find_moe(layer, family))}
    first = {i: otp.first_head(i, m.experts.hears, m.top_k, options) for i, m in moes.items()}
    fewest = len(moes) / sum(m.top_k for m in moes.values())
    pupil = Pupil(model, family, first, max(options.keep - BELOW, fewest), ranks)
    tau, made = [options.hot], 0
    each = max(1, LOGITS // (model.config.get_text_config().vocab_size * seen.shape[1]))
    text = options.steps * options.batch * seen.shape[1]
    show = ticker(progress, "learn", options.steps, text)

    def tick() -> None:  # once a step, those of a killed run too
        nonlocal made
        made += 1
        tau[0] = otp.temperature(made, options)
        show()

    schedule = Schedule(
        options.steps,
        options.batch,
        micro=min(each, options.batch // ranks.size),
        lr=options.lr,
        every=max(1, options.steps // CHECKS),
        seed=options.seed,
    )
    trained = train(
        pupil,
        loss_of(tau),
        seen,
        schedule,
        check=lambda: settle(pupil, held, each).kl_nats,
        folder=steps,
        ranks=ranks,
        rates=_rates(pupil, options),
        tick=tick,
    )
    settled = settle(pupil, held, each)
    heads = dict[str, Float32[Tensor, " ..."]]()
    for i, head in pupil.heads().items():
        ranks_up = torch.arange(len(head["down_bias"]), device=head["down_bias"].device)
        head["down_bias"] += settled.offset * ranks_up
        heads |= named(f"{prefix}.{i}.{moes[i].prefix}experts", head)
    return trained, settled, heads


def _rates(pupil: Pupil, options: otp.Options) -> dict[str, float]:
    """Of what does not move at the rate of the schedule, the share of it."""
    names = [n for n, _ in pupil.named_parameters() if n.endswith(".masks.down_bias")]
    return {"price": PRICE_RATE / options.lr, **dict.fromkeys(names, BIAS_RATE)}
