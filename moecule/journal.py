"""What a verb has done so far, beside its output: a killed run goes on from it.

    .OUT.partial/journal.jsonl    the request, then a line for every step done
    .OUT.partial/hidden/          hidden states to go on from
    .OUT.partial/...              what becomes the output, file by file

A line is written when all that it speaks of is on disk. The last line may be cut short by a kill;
it then counts as not written.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moecule.errors import OutputError
from moecule.files import missing_folders, remove_empty
from moecule.ranks import SOLO, Ranks
from moecule.states import Place, States

FILE = "journal.jsonl"
HIDDEN = "hidden"


@dataclass
class Journal:
    """Of one request. `entries` are the steps done, the request not among them."""

    folder: Path
    ranks: Ranks = SOLO
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Note a step; what it speaks of must be on disk."""
        self.ranks.wait()  # what others write too
        if self.ranks.is_first:
            _append(self.folder / FILE, entry)
        self.entries.append(dict(entry))

    def done(self, key: str) -> dict[int, dict[str, Any]]:
        """Steps of a kind by their number: {layer: entry}."""
        return {e[key]: e for e in self.entries if key in e}

    def has(self, word: str) -> bool:
        """Whether a step without a number is done."""
        return any(e.get("done") == word for e in self.entries)


@dataclass(frozen=True)
class Trail:
    """Where a walk keeps hidden states, and notes its layers. Nothing is on disk without folders."""

    place: Place = "device"
    folder: Path | None = None  # of hidden states
    journal: Journal | None = None  # with one, `folder` is inside it
    aside: torch.device | None = None  # where what a block hears goes; None: stays where it is

    def states(self, name: str, device: torch.device) -> States:
        """Room for the hidden states of all batches."""
        return States(device, self.place, None if self.folder is None else self.folder / name)

    def reopen(self, name: str, n: int, device: torch.device) -> States:
        """What a killed run left."""
        assert self.folder is not None  # a journal says that they are there
        return States.reopen(self.folder / name, n, device, self.place)

    def done(self, key: str) -> int:
        """How many steps of the kind an earlier run has done."""
        return 0 if self.journal is None else len(self.journal.done(key))

    def note(self, entry: Mapping[str, Any]) -> None:
        """A step is done, and its files are on disk."""
        if self.journal is not None:
            self.journal.add(entry)


NO_TRAIL = Trail()


def partial_of(out: Path) -> Path:
    """The folder beside `out` in which it is made."""
    out = out.resolve()  # "." has no name to write beside
    return out.with_name(f".{out.name}.partial")


@contextmanager
def journal_of(out: Path, request: Mapping[str, Any], ranks: Ranks = SOLO) -> Iterator[Journal]:
    """What an earlier run of the same request left beside `out`, or a new start.

    It stays when the work fails, so that it can go on. Who has put the output in place removes it.
    Raises OutputError where another process writes to `out`, or the journal is damaged.
    """
    partial = partial_of(out)
    with _only_one(out, ranks):
        wanted = json.loads(json.dumps({"request": dict(request)}))
        found = _read(partial / FILE) if ranks.is_first else []
        same = found[:1] == [wanted]
        if ranks.is_first and not same:
            _start(partial, wanted)
        entries = ranks.share(found[1:] if same else [], 0)
        journal = Journal(partial, ranks, entries)
        try:
            yield journal
        finally:
            if ranks.is_first and not journal.entries:  # nothing to go on from
                shutil.rmtree(partial, ignore_errors=True)


def _start(partial: Path, request: Mapping[str, Any]) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    _append(partial / FILE, request)


def _append(file: Path, entry: Mapping[str, Any]) -> None:
    with file.open("a") as f:
        f.write(json.dumps(entry, sort_keys=True) + "\n")
        f.flush()
        os.fsync(f.fileno())


def _read(file: Path) -> list[dict[str, Any]]:
    """The lines; a last one that was cut short is taken off the file."""
    if not file.is_file():
        return []
    raw = file.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        entries = [json.loads(line) for line in whole.splitlines()]
        if not all(map(_is_entry, entries[1:])) or not all(isinstance(e, dict) for e in entries):
            raise ValueError("a line says nothing that is known")
    except ValueError as e:
        raise OutputError(f"{file} is damaged ({e}); remove {file.parent} to begin again") from e
    if whole != raw:
        file.write_bytes(whole)
    return entries


def _is_entry(entry: Any) -> bool:
    steps = (entry.get("up"), entry.get("down")) if isinstance(entry, dict) else ()
    numbers = [n for n in steps if n is not None]
    return len(numbers) == 1 and type(numbers[0]) is int or bool(numbers == [] and "done" in entry)


@contextmanager
def _only_one(out: Path, ranks: Ranks) -> Iterator[None]:
    """Hold `.OUT.lock`. The system lets go of it when the process ends, however it does."""
    if not ranks.is_first:
        yield
        return
    file = out.resolve().with_name(f".{out.resolve().name}.lock")
    made = missing_folders(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not file.exists() or file.stat().st_ino != os.fstat(f.fileno()).st_ino:
                raise BlockingIOError("its holder has just let go of it")
        except BlockingIOError as e:
            raise OutputError(
                f"another process is writing to {out}; wait for it, or name another folder"
            ) from e
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            remove_empty(made)
