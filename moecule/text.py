"""What a model is given to read: windows of text, or conversations, as batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moecule.batch import Batch
from moecule.chat import all_chats, drawn_chats, held_out_chats, is_chat, read_chats
from moecule.data import (
    Sampling,
    all_windows,
    batches,
    check_tokens,
    held_out_windows,
    read_texts,
    sample_windows,
    window_length,
)
from moecule.hf import Streamed
from moecule.session import ASSETS, reader_of, tokenizer_of

BATCH = 8  # windows that pass together when they are measured
HELD_OUT = 32  # windows or conversations, where no text to evaluate on was given


def calibration_batches(
    streamed: Streamed, data: str | Path | None, sampling: Sampling
) -> list[Batch]:
    """Of the user's text, or of the text that comes with the package.

    Raises DataError for text that cannot be read or gives not one window.
    """
    config, path = streamed.model.config, streamed.checkpoint.path
    length = window_length(config, sampling.length)
    file = data or ASSETS / "text" / "calibration.jsonl"
    if is_chat(file):
        return drawn_chats(read_chats(file), reader_of(path), config, sampling, length)
    windows = sample_windows(tokenizer_of(path), read_texts(file), sampling, length)
    check_tokens(windows, config)
    return batches(windows, sampling.batch)


def evaluation_batches(
    config: Any,
    path: Path,
    text: Sequence[str | Path],
    length: int,
    data: str | Path | None,
    sampling: Sampling,
) -> dict[str, list[Batch]]:
    """What `evaluate` measures on, by the file's name: `config` and `path` are of the model.

    Raises DataError for text that cannot be read or gives not one window.
    """
    size = window_length(config, length or sampling.length)
    if data is not None and not text:
        return {f"held out of {Path(data).name}": _held_out(config, path, data, sampling, size)}
    files = text or sorted((ASSETS / "text" / "eval").glob("*.txt"))
    names = [Path(t).name for t in files]
    unique = names if len(set(names)) == len(names) else [str(t) for t in files]
    return {name: _whole(config, path, t, size) for name, t in zip(unique, files, strict=True)}


def _held_out(
    config: Any, path: Path, file: str | Path, sampling: Sampling, length: int
) -> list[Batch]:
    """Of the calibration text, what calibration does not see."""
    if is_chat(file):
        return held_out_chats(read_chats(file), reader_of(path), config, sampling, length, HELD_OUT)
    texts = read_texts(file)
    windows = held_out_windows(tokenizer_of(path), texts, sampling, length, HELD_OUT)
    check_tokens(windows, config)
    return batches(windows, BATCH)


def _whole(config: Any, path: Path, file: str | Path, length: int) -> list[Batch]:
    if is_chat(file):
        return all_chats(read_chats(file), reader_of(path), config, length)
    windows = all_windows(tokenizer_of(path), read_texts(file), length)
    check_tokens(windows, config)
    return batches(windows, BATCH)
