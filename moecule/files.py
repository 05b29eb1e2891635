"""Writing a file: all of it or nothing, and a full disk told from a bug."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moecule.errors import OutputError


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Around what writes `file`. Raises OutputError where the disk or the system refuses."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "make room" if full else "see that it can be written"
        raise OutputError(
            f"{file} cannot be written: {e.strerror or e}; {mend} and run it again"
        ) from e


def hold(f: IO[str]) -> None:
    """Lock an open file until it is closed. Raises BlockingIOError where another process holds it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as e:
            raise BlockingIOError("another process holds it") from e
    else:
        import fcntl

        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError for what is none, however deep it is nested."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError("nested too deep") from e


def save_whole(
    tensors: Mapping[str, Tensor],
    file: Path,
    *,
    sync: bool = True,
    said: Mapping[str, str] | None = None,
) -> None:
    """Tensors by name, in safetensors; `sync`: on the disk itself before this returns.

    `said`: what the header says instead of the format; one entry, for several come in any order.

    Raises OutputError where they cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        save_file(dict(sorted(tensors.items())), partial, metadata=dict(said or {"format": "pt"}))
        if sync:
            with partial.open("r+b") as f:  # Windows syncs only what may be written
                os.fsync(f.fileno())
        os.replace(partial, file)
    except (SafetensorError, OSError) as e:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{file} cannot be written: {e}; make room and run it again") from e


def write_text(file: Path, text: str) -> None:
    """Text. Raises OutputError where it cannot be written."""
    if file.is_dir():
        raise OutputError(f"{file} is a folder; name a file")
    partial, made = file.with_name(f".{file.name}.partial"), missing_folders(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, file)
    except OSError as e:
        partial.unlink(missing_ok=True)
        remove_empty(made)
        raise OutputError(f"{file} cannot be written: {e.strerror}; name another") from e


def missing_folders(file: Path) -> list[Path]:
    """The folders above `file` that are still to be made, the nearest first."""
    return [p for p in file.absolute().parents if not p.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those that nothing was put into."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
