"""Text -> dense windows of tokens: no padding, seeded, digested."""

from __future__ import annotations

import json
import lzma
import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moecule.batch import Batch
from moecule.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """How calibration windows are taken from text."""

    samples: int = 128
    length: int = 0  # tokens of a window; 0: min(2048, what the model knows)
    batch: int = 8  # windows that pass together
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises DataError for what no text can give."""
        for name, value in (("samples", self.samples), ("batch", self.batch)):
            if value < 1:
                raise DataError(f"{name} = {value}, wanted 1 window or more")


def read_text(path: str | Path) -> str:
    """The text of a file, packed as .xz or not. Raises DataError where it is missing or none."""
    path = Path(path)
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = raw.decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as e:
        raise DataError(
            f"{path} cannot be read as text ({e}); give UTF-8 text or JSON lines, packed as .xz or not"
        ) from e
    if "\0" in text:
        raise DataError(f"{path} holds zero bytes, so it is no text; give UTF-8 text or JSON lines")
    return text


def is_lines(path: str | Path) -> bool:
    """Whether a file's name says JSON lines."""
    return Path(path).name.removesuffix(".xz").endswith((".jsonl", ".json"))


def read_texts(path: str | Path) -> list[str]:
    """The documents of a file: JSON lines (strings, {"text": ...} or [..., text]) or plain text.

    Either may be packed as .xz. Raises DataError for a file that is missing or holds no text.
    """
    path, text = Path(path), read_text(path)
    texts = [text]
    if is_lines(path):
        # not splitlines(): a JSON string may hold U+2028 and the like
        lines = enumerate(text.split("\n"), 1)
        texts = [_document(line, path, n) for n, line in lines if line.strip()]
    texts = [t for t in texts if t.strip()]
    if not texts:
        raise DataError(f"{path} holds no text; give a file with at least one window of it")
    return texts


def _document(line: str, path: Path, n: int) -> str:
    try:
        doc = json.loads(line)
    except json.JSONDecodeError as e:
        raise DataError(
            f"{path}, line {n}: not JSON ({e.msg}); wanted a document a line, or name it .txt"
        ) from e
    text = (
        doc.get("text")
        if isinstance(doc, dict)
        else doc[-1]
        if isinstance(doc, list) and doc
        else doc
    )
    if not isinstance(text, str):
        raise DataError(
            f'{path}, line {n}: found {str(doc)[:40]!r}, wanted {{"text": ...}}, [..., text] or a string'
        )
    check_text(text, f"{path}, line {n}")
    return text


def check_text(text: str, where: str) -> None:
    """Raise DataError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{where} is no Unicode text ({e.reason}); mend it or leave it out") from e


def check_tokens(tokens: Int[Tensor, " ..."], config: Any) -> None:
    """Raise DataError for a tokenizer of another model: one that gives tokens this one lacks."""
    known, highest = int(config.get_text_config().vocab_size), int(tokens.max())
    if highest >= known:
        raise DataError(
            f"the tokenizer gives token {highest} and the model knows {known}; "
            "put the model's own tokenizer beside it"
        )


def room_for(ids: Int[Tensor, "one S"], config: Any) -> int:
    """New tokens that the model has places for after a prompt. Raises DataError where it leaves none."""
    check_tokens(ids, config)
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    if known is None:
        return sys.maxsize
    if ids.shape[1] >= known:
        raise DataError(
            f"the prompt has {ids.shape[1]} tokens, and with an answer the model knows {known}; "
            "give a shorter one"
        )
    return int(known) - ids.shape[1]


def window_length(config: Any, length: int = 0) -> int:
    """`length`, or min(2048, max_position_embeddings) for 0.

    Raises DataError for more than the model knows.
    """
    known = int(getattr(config.get_text_config(), "max_position_embeddings", 2048))
    if known < 2:
        raise DataError(
            f"the model's config.json says that it knows {known} tokens; fetch it again"
        )
    if length > known or length == 1 or length < 0:
        raise DataError(
            f"windows of {length} tokens were asked for, and the model knows 2 to {known}; give "
            "--length that"
        )
    return length or min(2048, known)


def sample_windows(
    tokenizer: Any, texts: Sequence[str], sampling: Sampling, length: int
) -> Int[Tensor, "N S"]:
    """`samples` windows: documents in seeded order, a random stretch of each, joined by end-of-text.

    Raises DataError where the text gives not one window; warns where it gives fewer than asked.
    """
    windows, _ = _draw(tokenizer, texts, seeded_order(texts, sampling), sampling, length)
    if len(windows) < sampling.samples:
        warnings.warn(
            f"the text gives {len(windows)} windows of {length} tokens, {sampling.samples} were asked for",
            stacklevel=2,
        )
    return windows


def held_out_windows(
    tokenizer: Any, texts: Sequence[str], sampling: Sampling, length: int, n: int
) -> Int[Tensor, "n S"]:
    """Up to n windows from documents that `sample_windows` of the same arguments does not touch.

    Warns, and takes what there is, where calibration leaves no text over.
    """
    order = seeded_order(texts, sampling)
    _, used = _draw(tokenizer, texts, order, sampling, length)
    other = replace(sampling, samples=n)
    if used < len(order):
        left = order[used:]
        tokens = sum(len(texts[i]) for i in left)
        if tokens > 8 * length:  # more than one window at any tokenizer's rate
            windows, _ = _draw(tokenizer, texts, left[::-1], other, length)
            return windows
    warnings.warn(
        "calibration uses all of the text, so the loss is measured on text it has seen; give --text",
        stacklevel=2,
    )
    windows, _ = _draw(tokenizer, texts, order[::-1], other, length)
    return windows


def split_windows(
    tokenizer: Any, texts: Sequence[str], sampling: Sampling, length: int, n: int
) -> tuple[Int[Tensor, "N S"], Int[Tensor, "M S"]]:
    """(up to `samples` windows to train on, up to n held out), of different documents.

    Raises DataError for text of which nothing is left to train on.
    """
    order = seeded_order(texts, sampling)
    held, used = _draw(tokenizer, texts, order[::-1], replace(sampling, samples=n), length)
    left = order[: len(order) - used]
    if not left:
        raise DataError(
            f"{n} held-out windows take all {len(order)} documents of the text; give more of them, "
            "a line each (.jsonl)"
        )
    return _draw(tokenizer, texts, left, sampling, length)[0], held


def seeded_order(texts: Sequence[Any], sampling: Sampling) -> list[int]:
    """In which documents are drawn."""
    return random.Random(sampling.seed).sample(range(len(texts)), len(texts))


def _draw(
    tokenizer: Any, texts: Sequence[str], order: Sequence[int], sampling: Sampling, length: int
) -> tuple[Int[Tensor, "N S"], int]:
    """(windows, how many documents of `order` they come from)."""
    lot, used = random.Random(sampling.seed), 0
    stream: list[int] = []
    crop = len(order) >= 2 * sampling.samples  # few documents are taken whole
    for i in order:
        ids = tokenizer(texts[i], add_special_tokens=False, verbose=False)["input_ids"]
        spare = len(ids) - length if crop else 0
        start = lot.randint(0, spare) if spare > 0 else 0
        stream += ids[start : start + length] if spare > 0 else ids
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        used += 1
        if len(stream) >= sampling.samples * length:
            break
    found = min(len(stream) // length, sampling.samples)
    if found == 0:
        raise DataError(
            f"the text has {len(stream)} tokens and one window takes {length}; give more text"
        )
    return torch.tensor(stream[: found * length]).view(found, length), used


def all_windows(tokenizer: Any, texts: Sequence[str], length: int) -> Int[Tensor, "N S"]:
    """Non-overlapping windows over the whole text, tokenised once, documents joined by a blank line.

    Each window starts cold; the last, shorter one is left out. Raises DataError for none.
    """
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    n = len(ids) // length
    if n == 0:
        raise DataError(
            f"the text has {len(ids)} tokens and one window takes {length}; give more text"
        )
    return torch.tensor(ids[: n * length]).view(n, length)


def batches(windows: Int[Tensor, "N S"], size: int) -> list[Batch]:
    """The windows in order, `size` at a time."""
    return list(windows.split(size))
