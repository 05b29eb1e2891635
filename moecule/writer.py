"""A checkpoint's tensors to disk, a file a part of the model, and the finished folder put in place.

Every file is whole or not there, and its name and content depend on nothing but its part. So a
killed run writes the rest and the result is the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from moecule.checkpoint import INDEX
from moecule.errors import OutputError
from moecule.files import save_whole, write_text, writing

SHARD_BYTES = 4 * 2**30  # of one file, at most, unless one tensor is larger
SINGLE_BYTES = 2**30  # a checkpoint up to here becomes one file
SINGLE = "model.safetensors"
OURS = re.compile(r"\..*\.(partial|lock)")  # of journal.py and files.py


class Writer:
    """Writes parts into `folder`; `close` makes a checkpoint of them."""

    def __init__(
        self, folder: Path, shard_bytes: int = SHARD_BYTES, single_bytes: int = SINGLE_BYTES
    ) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shard_bytes, self.single_bytes = folder, shard_bytes, single_bytes

    def add(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write all tensors of a part of the model. Raises OutputError where there is no room."""
        pieces = list(_pieces(tensors, self.shard_bytes))
        for i, names in enumerate(pieces):
            end = f"-{i + 1}-of-{len(pieces)}" if len(pieces) > 1 else ""
            ready = {n: tensors[n].detach().cpu().contiguous() for n in names}
            save_whole(ready, self.folder / f"model-{part}{end}.safetensors")

    def close(self) -> int:
        """Finish, and return the bytes of all tensors. May be called again after a kill."""
        parts = sorted(self.folder.glob("model-*.safetensors"))
        if (self.folder / SINGLE).is_file():  # killed when all was in it
            for file in parts:
                file.unlink()
            parts = []
        if not parts:
            return sum(_sizes(self.folder / SINGLE).values())
        sizes = {file: _sizes(file) for file in parts}
        total = sum(size for of in sizes.values() for size in of.values())
        if total <= self.single_bytes:
            tensors: dict[str, Tensor] = {}
            for file in parts:
                with safe_open(file, "pt") as f:
                    tensors |= {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
            save_whole(tensors, self.folder / SINGLE)
            for file in parts:
                file.unlink()
            return total
        weight_map = {n: file.name for file in parts for n in sizes[file]}
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        return total


def _pieces(tensors: Mapping[str, Tensor], most: int) -> Iterator[list[str]]:
    """Names in order, in runs of at most `most` bytes."""
    piece, held = list[str](), 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        if piece and held + size > most:
            yield piece
            piece, held = [], 0
        piece.append(name)
        held += size
    yield piece


def _sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor, from the header."""
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    offsets = {n: t["data_offsets"] for n, t in header.items() if n != "__metadata__"}
    return {n: end - start for n, (start, end) in offsets.items()}


def move_into(made: Path, out: Path) -> None:
    """Put a finished folder in place: config.json last, so that a half-moved one does not load.

    May be called again after a kill. Raises OutputError where `out` cannot be written.
    """
    last = ("config.json", "meta.json")  # each says of its folder that it is whole
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(made.iterdir(), key=lambda p: (p.name in last, p.name)):
            os.replace(file, out / file.name)


def put_in_place(made: Path, out: Path) -> None:
    """Make a finished folder `out`, which is not there or empty, at one stroke.

    Raises OutputError where it cannot be, as when something was put there meanwhile.
    """
    out = out.resolve()
    with writing(out):
        if out.is_dir():
            out.rmdir()
        os.replace(made, out)


def check_out(out: Path, allowed: set[str], *, ours: bool = True) -> None:
    """Raise OutputError where `out` cannot be made or holds anything but `allowed`.

    `ours`: what a killed run goes on from may lie there too.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder that does not exist yet")
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be made: {there} is no folder to write in; name another")
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    foreign = sorted(n for n in names - allowed if not (ours and OURS.fullmatch(n)))
    if foreign:
        raise OutputError(f"{out} already holds {', '.join(foreign[:4])}; name another folder")
