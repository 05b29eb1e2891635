"""What a model is taught, and what is left of it beside the checkpoint: windows, a schedule, a history."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moecule.batch import digest
from moecule.checkpoint import Checkpoint
from moecule.data import Sampling, check_tokens, read_texts, split_windows, window_length
from moecule.errors import CheckpointError, DataError, OutputError, RecipeError
from moecule.files import parse_json, write_text
from moecule.folder import HEALED
from moecule.hf import skeleton
from moecule.ranks import Ranks
from moecule.session import ASSETS, open_checkpoint, tokenizer_of
from moecule.train.moved import write_changed
from moecule.train.schedule import Schedule, Trained
from moecule.train.student import check_parts

TOGETHER = 8  # windows that the teacher is asked, or the student checked on, at once
HELD_OUT = 32  # windows that say which state is best
FILE = "healing.json"
Teaching = Literal["auto", "beside", "said"]


@dataclass(frozen=True)
class Lesson:
    """How a model is taught."""

    # of student.PARTS; none: what of it is not codes, all if nothing is
    parts: tuple[str, ...] = ()
    schedule: Schedule = Schedule()
    teaching: Teaching = "auto"  # beside the student, or said before; auto: beside where it fits
    top_k: int = 64  # tokens that are kept of what is said before
    by_layer: bool = False
    experts_over: int = 1
    length: int = 0  # tokens of a window; 0: as calibration
    checkpointing: bool = (
        False  # layers keep their input alone, and are computed again on the way back
    )
    # what moves lies in host memory, and a layer on the GPU while it runs: then, too, it is computed again,
    # for what it keeps for the way back is as large as it is
    offload: bool = False

    def __post_init__(self) -> None:
        """Raises RecipeError for what cannot be."""
        if self.parts:
            check_parts(self.parts)
        if self.top_k < 1:
            raise RecipeError(f"top_k = {self.top_k}, wanted 1 token or more")
        if self.by_layer and self.teaching == "said":
            raise RecipeError(
                "layers learn the teacher's outputs, not its tokens; leave out --top-k"
            )
        if self.by_layer and {"lora"} & {*self.parts}:
            raise RecipeError("layers are healed without lora; name other parts (--parts)")
        if self.by_layer and self.offload:
            raise RecipeError("layers are on the GPU one by one as it is; leave out --offload")
        object.__setattr__(self, "checkpointing", self.checkpointing or self.offload)


def check_teacher(checkpoint: Checkpoint, teacher: str | Path) -> None:
    """Raise CheckpointError for a teacher of another vocabulary."""
    other = open_checkpoint(teacher)
    sizes = [
        skeleton(c, torch.float32)[0].config.get_text_config().vocab_size
        for c in (checkpoint, other)
    ]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the teacher {teacher} knows {sizes[1]} tokens and {checkpoint.name} {sizes[0]}; give the "
            "model that it was made of"
        )
    if not has_tokenizer(other.path):
        return
    own, theirs = (tokenizer_of(p).get_vocab() for p in (checkpoint.path, other.path))
    differing = [token for token, at in own.items() if theirs.get(token) != at]
    if differing:
        raise CheckpointError(
            f"the teacher {teacher} has another vocabulary: {differing[0]!r} ({len(differing)} such) is "
            "another token there; give the model that it was made of"
        )


def has_tokenizer(path: Path) -> bool:
    """Whether a tokenizer's files lie there; a teacher needs none."""
    return (path / "tokenizer_config.json").is_file() or (path / "tokenizer.json").is_file()


def lesson_windows(
    checkpoint: Checkpoint, data: str | Path | None, lesson: Lesson, size: int
) -> tuple[Int[Tensor, "N S"], Int[Tensor, "M S"]]:
    """(as many as the schedule sees, or all there are; held out).

    Raises DataError for text of which nothing is left to hold out.
    """
    config = skeleton(checkpoint, torch.float32)[0].config
    length, schedule = window_length(config, lesson.length), lesson.schedule
    texts = read_texts(data or ASSETS / "text" / "calibration.jsonl")
    sampling = Sampling(schedule.steps * schedule.batch, seed=schedule.seed)
    found = split_windows(tokenizer_of(checkpoint.path), texts, sampling, length, HELD_OUT)
    for windows in found:
        check_tokens(windows, config)
    seen, held = found
    even = len(held) // size * size  # as many for each process
    if not even:
        raise DataError(f"{size} processes share {len(held)} held-out windows; give more text")
    return seen, held[:even]


def request_of(
    size: int, windows: Int[Tensor, "N S"], held: Int[Tensor, "M S"], **how: Any
) -> dict[str, Any]:
    """What a training run is known again by, as JSON has it; `size`: processes."""
    tokens = {"processes": size, "tokens": [digest([windows]), digest([held])]}
    return {**tokens, **json.loads(json.dumps(how))}


def noted(out: Path, which: str = HEALED) -> Any:
    """The request that made the checkpoint in `out`, if training did; `which` kind of it."""
    if not (out / "config.json").is_file() or not (out / FILE).is_file():
        return None
    return open_checkpoint(out).config.get("moecule", {}).get(which)


def history(out: Path) -> dict[str, Trained]:
    """What came of the lesson that made the checkpoint in `out`, by its parts. Raises OutputError."""
    file = out / FILE
    try:
        said = parse_json(file.read_text(encoding="utf-8"))
        return {name: Trained.from_dict(of) for name, of in said.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise OutputError(f"{file} is damaged ({e!r}); remove {out} and train again") from e


def warn_of_stops(out: Path) -> None:
    """Warn where a loss diverged in what made the checkpoint in `out`."""
    for name, of in history(out).items():
        if of.stopped is not None:
            warnings.warn(f"{name}: {of.stopped}; the best before it was kept", stacklevel=3)


def mean_of(
    loss: Callable[[Int[Tensor, "B S"]], Float[Tensor, ""]],
    windows: Int[Tensor, "N S"],
    ranks: Ranks,
) -> float:
    """The loss of windows, of which every process has as many, TOGETHER at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.stack(ranks.mine(list(windows))).split(TOGETHER):
        total += len(part) * loss(part).double().cpu()
    return float(ranks.add_up(total)) / len(windows)


def write_taught(
    checkpoint: Checkpoint,
    moved: Mapping[str, Tensor],
    made: Path,
    noted: Mapping[str, Any],
    trained: Mapping[str, Trained],
) -> None:
    """The checkpoint anew into `made`, what is `noted` in its config.json, and what came of the lesson."""
    write_changed(checkpoint, moved, made)
    config = dict(parse_json((made / "config.json").read_text(encoding="utf-8")))
    config["moecule"] = {**config.get("moecule", {}), **noted}
    write_text(made / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(made / FILE, json.dumps({n: asdict(t) for n, t in trained.items()}) + "\n")
