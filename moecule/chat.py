"""Conversations, with pictures or without -> batches of one, by the model's own processor.

JSON lines: {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"},
{"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}. A picture is
a file, sought beside the lines' own file. A conversation is never cut: half a picture is none.
"""

from __future__ import annotations

import json
import lzma
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from moecule.batch import IGNORED, Batch, tokens_of
from moecule.data import Sampling, check_text, check_tokens, is_lines, read_text, seeded_order
from moecule.errors import DataError

Messages = list[dict[str, Any]]


def is_chat(path: str | Path) -> bool:
    """Whether a file holds conversations: JSON lines, the first of them with "messages"."""
    if not is_lines(path):
        return False
    opened = lzma.open if Path(path).suffix == ".xz" else open
    try:  # one line: who reads the file reads all of it, and says what is wrong with it
        with opened(path, "rt", encoding="utf-8") as f:
            doc = json.loads(next((line for line in f if line.strip()), ""))
    except (OSError, EOFError, lzma.LZMAError, ValueError):
        return False
    return isinstance(doc, dict) and "messages" in doc


def read_chats(path: str | Path) -> list[Messages]:
    """The conversations of a file; pictures are opened when they are drawn.

    Raises DataError for a line that is none.
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    return [_messages(line, Path(path), n) for n, line in lines if line.strip()]


def _messages(line: str, path: Path, n: int) -> Messages:
    where = f"{path}, line {n}"
    try:
        doc = json.loads(line)
    except json.JSONDecodeError as e:
        raise DataError(f"{where}: not JSON ({e.msg}); wanted a conversation a line") from e
    messages = doc.get("messages") if isinstance(doc, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: found {str(doc)[:40]!r}, wanted {{"messages": [...]}}')
    return [_message(m, path, where) for m in messages]


def _message(message: Any, path: Path, where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(role, str) or not isinstance(content, str | list):
        raise DataError(
            f'{where}: found {str(message)[:40]!r}, wanted {{"role": ..., "content": ...}}'
        )
    check_text(role, where)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": role, "content": [_part(part, path, where) for part in parts]}


def _part(part: Any, path: Path, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if kind in ("text", "image") else None
    if not isinstance(kind, str) or not isinstance(value, str):
        raise DataError(
            f"{where}: found {str(part)[:60]!r}, wanted "
            '{"type": "text", "text": ...} or {"type": "image", "image": a file}'
        )
    check_text(value, where)
    return {"type": kind, kind: path.parent / value if kind == "image" else value}


def drawn_chats(
    chats: Sequence[Messages], reader: Any, config: Any, sampling: Sampling, length: int
) -> list[Batch]:
    """`samples` conversations in seeded order, each a batch. Those of more tokens are left out.

    `reader`: the model's processor, or the tokenizer of one that sees no pictures. Raises DataError
    for what it cannot take, and where no conversation is left; warns where there are fewer than asked.
    """
    batches = list(islice(_batches(chats, reader, config, sampling, length), sampling.samples))
    if len(batches) < sampling.samples:
        warnings.warn(
            f"the file gives {len(batches)} conversations of at most {length} tokens, "
            f"{sampling.samples} were asked for",
            stacklevel=2,
        )
    return batches


def held_out_chats(
    chats: Sequence[Messages], reader: Any, config: Any, sampling: Sampling, length: int, n: int
) -> list[Batch]:
    """Up to n conversations that `drawn_chats` of the same arguments does not draw.

    Warns, and takes what there is, where calibration leaves none over.
    """
    found = _batches(chats, reader, config, sampling, length)
    seen = list(islice(found, sampling.samples))
    held = list(islice(found, n))
    if not held:
        warnings.warn(
            "calibration uses all conversations, so the loss is measured on what it has seen; "
            "give --text",
            stacklevel=2,
        )
    return held or seen[::-1][:n]


def all_chats(chats: Sequence[Messages], reader: Any, config: Any, length: int) -> list[Batch]:
    """Every conversation of at most so many tokens, in order. Raises DataError for none."""
    return list(_fitting(chats, reader, config, length))


def _batches(
    chats: Sequence[Messages], reader: Any, config: Any, sampling: Sampling, length: int
) -> Iterator[Batch]:
    return _fitting([chats[i] for i in seeded_order(chats, sampling)], reader, config, length)


def _fitting(chats: Sequence[Messages], reader: Any, config: Any, length: int) -> Iterator[Batch]:
    """Those of at most `length` tokens. Raises DataError where there is not one."""
    some = False
    for messages in chats:
        batch = to_batch(messages, reader, config)
        if 2 <= tokens_of(batch).shape[1] <= length:
            some = True
            yield batch
    if not some:
        raise DataError(
            f"none of {len(chats)} conversations has 2 to {length} tokens; raise --length, or make "
            "pictures smaller"
        )


def to_batch(messages: Messages, reader: Any, config: Any) -> Batch:
    """One conversation as the model takes it, with labels. Raises DataError where it cannot be."""
    seen = [p["image"] for m in messages for p in m["content"] if p["type"] == "image"]
    sees = getattr(reader, "image_processor", None) is not None
    if seen and not sees:
        raise DataError(
            f"{seen[0]} is a picture, and there is no processor of pictures beside the model; "
            "fetch it, or leave pictures out"
        )
    ready = [{"role": m["role"], "content": _content(m["content"], sees)} for m in messages]
    try:
        made = reader.apply_chat_template(
            ready, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as e:
        raise DataError(
            f"the model's chat template does not take a conversation: {e}; give documents"
        ) from e
    parts = {name: t for name, t in made.items() if isinstance(t, Tensor)}
    ids = parts["input_ids"]
    check_tokens(ids, config)
    labels = ids.clone()
    if seen:
        kinds = torch.tensor(reader.create_mm_token_type_ids(ids.tolist()))
        if not kinds.any():
            raise DataError(
                "the model's processor does not say which tokens stand for pictures; leave pictures out"
            )
        labels[kinds != 0] = IGNORED
    return {**parts, "labels": labels}


def _content(parts: Sequence[dict[str, Any]], sees: bool) -> str | list[dict[str, Any]]:
    """As a processor takes it, or as the templates of models without pictures do."""
    if not sees:
        return "".join(part["text"] for part in parts)
    return [p if p["type"] == "text" else {**p, "image": open_picture(p["image"])} for p in parts]


def open_picture(file: Path) -> Any:
    """In colours. Raises DataError where it cannot be read."""
    try:
        from PIL import Image
    except ImportError as e:
        raise DataError(f"reading {file} needs Pillow; pip install pillow") from e
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError(
            f"{file} cannot be read as a picture ({e}); mend the line that names it"
        ) from e
