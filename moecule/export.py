"""export: a compressed folder as another engine reads it, read again before it is put in place."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from moecule.budget import format_size
from moecule.errors import RecipeError, VerifyError
from moecule.files import write_text, writing
from moecule.journal import only_one
from moecule.licence import CARD
from moecule.session import Compute, Progress, load, silent, ticker, tokenizer_of
from moecule.states import free_host_bytes
from moecule.writer import check_out, put_in_place

if TYPE_CHECKING:
    from moecule.exports.change import Change
    from moecule.exports.contents import Contents

RECORD = "export.json"
GGUF = "model.gguf"


@dataclass(frozen=True)
class Exported:
    """What was written, and what it cost."""

    folder: str
    to: str
    model: str
    digest: str
    size_bytes: int  # of all files
    changes: tuple[Change, ...]
    left_out: tuple[str, ...]  # what the other engine does not do
    checked: str  # who opened it
    kl_nats: float | None  # of what that computed, to the folder; None: it was not run

    @property
    def error(self) -> float:
        """The largest |new - old| / |old| of the weights of one width and type."""
        return max(change.error for change in self.changes)


def export(
    model: str | Path,
    out: str | Path,
    to: str,
    *,
    types: Sequence[str] = (),
    progress: Progress = silent,
) -> Exported:
    """Write a compressed folder, or any stock one, into the folder `out` for another engine.

    `types`: of gguf, what to store widths as (`Q4_1` or `2=Q2_K`); else the smallest that keeps codes.

    Raises PlanError for what the engine cannot run, CheckpointError for a source or tokenizer that is not
    served, RecipeError for types or packages that are not there, OutputError where `out` holds other
    things, VerifyError where what was written reads or computes otherwise.
    """
    out = Path(out)
    write = _writer(to)
    from moecule.exports.contents import Contents

    if types and to != "gguf":
        raise RecipeError(
            f"--type is of gguf, and --to {to} has one way to store a width; leave it out"
        )
    check_out(out, set(), ours=False)
    contents = Contents.open(model)
    with only_one(out), _made_aside(out) as made:
        changes, checked, kl = write(contents, made, types, progress)
        left_out = ("experts are not skipped online",) if contents.skips else ()
        size = sum(file.stat().st_size for file in made.iterdir())
        source = contents.checkpoint
        told = (str(out), to, source.name, source.digest, size, changes, left_out, checked, kl)
        done = Exported(*told)
        write_text(made / RECORD, json.dumps(asdict(done), indent=2) + "\n")
        if to == "transformers":
            from moecule.card import card

            tensors = sum(change.size_bytes for change in changes)
            kinds = " and ".join(sorted({change.kind for change in changes}))
            of = contents.family.model_type
            write_text(made / CARD, card(source, of, tensors, kinds, checked))
        put_in_place(made, out)
    return done


Made = tuple["tuple[Change, ...]", str, float | None]  # changes, who opened it, KL
Writing = Callable[["Contents", Path, Sequence[str], Progress], Made]


def _writer(to: str) -> Writing:
    if to not in FORMATS:
        raise RecipeError(f"--to {to!r} is not known; wanted {' or '.join(FORMATS)}")
    needed, write = FORMATS[to]
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise RecipeError(f"--to {to} needs {needed}: pip install 'moecule[export]'")
    return write


@contextmanager
def _made_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out`, empty; gone when this ends, and begun anew where it was killed."""
    made = out.resolve().with_name(f".{out.resolve().name}.export")
    with writing(made):
        shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
        made.mkdir(parents=True)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _gguf(contents: Contents, made: Path, types: Sequence[str], progress: Progress) -> Made:
    from moecule.exports import gguf_file, llama

    tick = ticker(progress, "export", contents.n_layers + 1)
    changes = gguf_file.write(contents, made / GGUF, gguf_file.types_of(types), tick)
    if not llama.is_there():
        return changes, "read again by gguf; llama-cpp-python is not installed, so not run", None
    tick = ticker(progress, "run by llama.cpp", 1)
    kl = _compared(contents, changes, lambda ids: llama.run_file(made / GGUF, ids))
    tick()
    ran = "run by llama.cpp" if kl is not None else "too large to run here"
    return changes, f"read again by gguf, {ran}", kl


def _compressed(contents: Contents, made: Path, types: Sequence[str], progress: Progress) -> Made:
    from moecule.exports import compressed

    changes = compressed.write(contents, made, ticker(progress, "export", contents.n_layers + 1))
    return _by_transformers(contents, made, changes, "compressed_tensors", progress)


def _auto_round(contents: Contents, made: Path, types: Sequence[str], progress: Progress) -> Made:
    from moecule.exports import auto_round

    changes = auto_round.write(contents, made, ticker(progress, "export", contents.n_layers + 1))
    return _by_transformers(contents, made, changes, "auto_round", progress)


def _unpacked(contents: Contents, made: Path, types: Sequence[str], progress: Progress) -> Made:
    from moecule.exports import unpacked

    changes = unpacked.write(contents, made, ticker(progress, "export", contents.n_layers + 1))
    return _by_transformers(contents, made, changes, "transformers", progress)


def _by_transformers(
    contents: Contents, made: Path, changes: tuple[Change, ...], package: str, progress: Progress
) -> Made:
    """Opened by stock transformers with the package that it asks for, if that is there."""
    from moecule.exports import stock

    # auto-round changes how transformers loads a family, for as long as the process lives
    alone = package == "auto_round"
    run = stock.logits_in_a_process if alone else stock.logits_by_transformers
    if importlib.util.find_spec(package) is None:
        return changes, f"{package} is not installed, so not opened", None
    tick = ticker(progress, "run by transformers", 1)
    kl = _compared(contents, changes, partial(run, made))
    tick()
    ran = "opened and run" if kl is not None else "too large to open"
    having = "" if package == "transformers" else f" with {package}"
    return changes, f"{ran} by transformers{having}", kl


FORMATS: dict[str, tuple[str | None, Writing]] = {  # what each needs, and what writes it
    "gguf": ("gguf", _gguf),
    "compressed-tensors": (None, _compressed),
    "auto-round": (None, _auto_round),
    "transformers": (None, _unpacked),
}
TEXT = (
    "Once upon a time, in the year 1984, a girl's dog could not   run fast.\n\nIt was not the first time; "
    'the man said: "Hello, world!" and went away.'
)
# Where weights are the same, up to this share of their length, what is computed must be: engines round
# activations, so a little differs. Nats a token.
SAME, MOST_KL = 0.002, 0.1


def _compared(
    contents: Contents, changes: Sequence[Change], run: Callable[[list[int]], Float[Tensor, "S V"]]
) -> float | None:
    """KL of what the other engine computes to what moecule does; None where memory has no room to tell.

    Raises VerifyError where it is not a number, or large although weights are the same.
    """
    model, cpu = contents.checkpoint.path, Compute("cpu", "float32")
    dense_bytes = 4 * sum(p.numel() for p in contents.model.parameters())
    if 1.5 * dense_bytes > free_host_bytes():
        return None
    ids = tokenizer_of(model)(TEXT)["input_ids"]
    with torch.no_grad():
        ours: Any = load(model, cpu)(torch.tensor([ids])).logits[0]
    p, q = ours.double().log_softmax(-1), run(ids).double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    if not kl <= (MOST_KL if max(c.error for c in changes) <= SAME else float("inf")):
        raise VerifyError(
            f"{model}: what was written computes something else there: KL {kl:.3g} nats; report it"
        )
    return kl


def table(made: Exported) -> list[tuple[str, ...]]:
    """What became of the weights, for people; the first row is the head."""
    head = ("bits", "stored as", "matrices", "size", "changed by")
    rows: list[tuple[str, ...]] = [head]
    for change in made.changes:
        error = f"{change.error:.2g}" if change.error else "nothing"
        size = format_size(change.size_bytes)
        rows.append((str(change.bits), change.kind, str(change.matrices), size, error))
    if made.kl_nats is not None:
        rows.append(("", "KL, nats", "", "", f"{made.kl_nats:.2g}"))
    return rows
