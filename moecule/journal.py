"""What a verb has done so far, beside its output: a killed run goes on from it.

    .OUT.partial/journal.jsonl    the request, then a line for every step done
    .OUT.partial/hidden/          hidden states to go on from
    .OUT.partial/...              what becomes the output, file by file

A line is written when all that it speaks of is on disk, and carries a sum of itself and those
before it. The last line may be cut short by a kill; it then counts as not written. The journal goes
first when the output is in place: what lies in a folder without one is to be removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moecule.errors import OutputError
from moecule.files import hold, missing_folders, parse_json, remove_empty, writing
from moecule.ranks import SOLO, Ranks
from moecule.states import Place, States
from moecule.writer import check_out, move_into

FILE = "journal.jsonl"
HIDDEN = "hidden"
WRITTEN = "written"  # all of the output is there, to be put in place
Entry = dict[str, Any]


@dataclass
class Journal:
    """Of one request. `entries` are the steps done, the request not among them."""

    folder: Path
    ranks: Ranks = SOLO
    entries: list[Entry] = field(default_factory=list)
    seal: str = ""  # the last line's sum

    def add(self, entry: Mapping[str, Any]) -> None:
        """Note a step; what it speaks of must be on disk. Raises OutputError where it cannot be."""
        self.ranks.wait()  # what others write too
        if self.ranks.is_first:
            self.seal = _append(self.folder / FILE, entry, self.seal)
        self.entries.append(dict(entry))

    def written(self, files: Iterable[str]) -> None:
        """Note that these files are all there is to put in place."""
        self.add({"done": WRITTEN, "files": sorted(files)})

    @property
    def is_written(self) -> bool:
        """Whether all of the output is there."""
        return any(e.get("done") == WRITTEN for e in self.entries)

    def remove(self) -> None:
        """The output is in place; there is nothing to go on from."""
        if self.ranks.is_first:
            with writing(self.folder):
                (self.folder / FILE).unlink()
                shutil.rmtree(self.folder)

    @property
    def made(self) -> Path:
        """The folder that becomes the output."""
        return self.folder / "made"

    def done(self, key: str) -> dict[int, Entry]:
        """Steps of a kind by their number: {layer: entry}."""
        return {e[key]: e for e in self.entries if key in e}


@dataclass(frozen=True)
class Trail:
    """Where a walk keeps hidden states, and notes its layers. Nothing is on disk without folders."""

    place: Place = "device"
    folder: Path | None = None  # of hidden states
    journal: Journal | None = None  # with one, `folder` is inside it
    aside: torch.device | None = None  # where what a block hears goes; None: stays where it is
    of: str = ""  # before the names of its steps, where several walks share a journal

    def states(self, name: str, device: torch.device) -> States:
        """Room for the hidden states of all batches."""
        return States(device, self.place, None if self.folder is None else self.folder / name)

    def reopen(self, name: str, n: int, device: torch.device) -> States:
        """What a killed run left."""
        assert self.folder is not None  # a journal says that they are there
        return States.reopen(self.folder / name, n, device, self.place)

    def done(self, key: str) -> int:
        """How many steps of the kind an earlier run has done."""
        return 0 if self.journal is None else len(self.journal.done(self.of + key))

    def note(self, entry: Mapping[str, Any]) -> None:
        """A step is done, and its files are on disk."""
        if self.journal is not None:
            self.journal.add({self.of + key: value for key, value in entry.items()})


NO_TRAIL = Trail()


def partial_of(out: Path) -> Path:
    """The folder beside `out` in which it is made."""
    out = out.resolve()  # "." has no name to write beside
    return out.with_name(f".{out.name}.partial")


@contextmanager
def journal_of(out: Path, request: Mapping[str, Any], ranks: Ranks = SOLO) -> Iterator[Journal]:
    """What an earlier run of the same request left beside `out`, or a new start.

    It stays when the work fails, so that it can go on. Who has put the output in place removes it.
    That of another request is thrown away.
    Raises OutputError where another process writes to `out`, or the journal is damaged.
    """
    partial = partial_of(out)
    with only_one(out, ranks):
        wanted = json.loads(json.dumps({"request": dict(request)}))
        found, seal, whole = _read(partial / FILE) if ranks.is_first else ([], "", 0)
        same = found[:1] == [wanted]
        if ranks.is_first:
            with writing(partial):
                if same:
                    os.truncate(partial / FILE, whole)  # a line cut short
                else:
                    seal = _start(partial, wanted)
        journal = Journal(partial, ranks, ranks.share(found[1:] if same else [], 0), seal)
        try:
            yield journal
        finally:
            if ranks.is_first and not journal.entries:  # nothing to go on from
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def making(
    out: Path, request: Mapping[str, Any], ranks: Ranks = SOLO, allowed: Iterable[str] = ()
) -> Iterator[Journal]:
    """`journal_of`; what the caller leaves in its `made` is put in place.

    Raises OutputError where `out` holds what is neither `allowed` nor was put there by this request.
    """
    if ranks.is_first:
        check_out(out, {*allowed} | placed(out))
    with journal_of(out, request, ranks) as journal:
        if ranks.is_first and not journal.is_written:  # another request has put there what it may
            check_out(out, {*allowed})
        yield journal
        if not journal.is_written:
            journal.written(p.name for p in (journal.made.iterdir() if ranks.is_first else ()))
        if ranks.is_first:
            move_into(journal.made, out)
        journal.remove()
        ranks.wait()


def placed(out: Path) -> set[str]:
    """Files that a run killed while it put them in place may have put there.

    Raises OutputError where its journal is damaged.
    """
    entries = _read(partial_of(out) / FILE)[0]
    return {name for e in entries if e.get("done") == WRITTEN for name in e["files"]}


def sweep(out: Path, ranks: Ranks = SOLO, *, whole: bool) -> None:
    """Remove what a run killed at its very end left beside `out`. `whole`: `out` has all it should.

    Raises OutputError where another process writes to `out`.
    """
    partial = partial_of(out)
    if not ranks.is_first or not (partial.exists() or _lock_of(out).exists()):
        return
    with only_one(out, ranks):
        if whole or not (partial / FILE).exists():
            shutil.rmtree(partial, ignore_errors=True)


def _start(partial: Path, request: Entry) -> str:
    if partial.is_dir():
        (partial / FILE).unlink(missing_ok=True)
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return _append(partial / FILE, request, "")


def _append(file: Path, entry: Mapping[str, Any], seal: str) -> str:
    """Write a line after the one of the sum `seal`; its own sum."""
    seal = _sum(entry, seal)
    with writing(file), file.open("a") as f:
        f.write(json.dumps({**entry, "sum": seal}) + "\n")
        f.flush()
        os.fsync(f.fileno())
    return seal


def _sum(entry: Mapping[str, Any], seal: str) -> str:
    text = seal + json.dumps(dict(entry))  # in its own order, which files follow
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(file: Path) -> tuple[list[Entry], str, int]:
    """(the lines, the last one's sum, the bytes they take). What follows was cut short."""
    entries, seal, whole = list[Entry](), "", 0
    try:
        raw = file.read_bytes() if file.exists() else b""
        whole = raw.rfind(b"\n") + 1
        for line in raw[:whole].split(b"\n")[:-1]:
            entry = parse_json(line)
            found = entry.pop("sum", None) if isinstance(entry, dict) else None
            seal = _sum(entry, seal) if found else ""
            if not found or found != seal:
                raise ValueError(f"line {len(entries) + 1} is not as it was written")
            entries.append(entry)
    except (OSError, ValueError) as e:
        raise OutputError(f"{file} is damaged ({e}); remove {file.parent} to begin again") from e
    return entries, seal, whole


def _lock_of(out: Path, what: str = "lock") -> Path:
    out = out.resolve()
    return out.with_name(f".{out.name}.{what}")


@contextmanager
def only_one(out: Path, ranks: Ranks = SOLO, what: str = "lock") -> Iterator[None]:
    """Hold `.OUT.lock`. The system lets go of it when the process ends, however it does.

    Raises OutputError where another process holds it.
    """
    if not ranks.is_first:
        yield
        return
    file = _lock_of(out, what)
    made = missing_folders(file)
    with ExitStack() as stack:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            f = stack.enter_context(file.open("w"))
        try:
            hold(f)
            if not _is_at(f.fileno(), file):
                raise BlockingIOError("its holder has just let go of it")
        except BlockingIOError as e:
            raise OutputError(
                f"another process is writing to {out}; wait for it, or name another folder"
            ) from e
        try:
            yield
        finally:
            if sys.platform == "win32":  # which removes no file that is open
                f.close()
            file.unlink(missing_ok=True)
            remove_empty(made)


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
