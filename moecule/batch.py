"""What passes through a model together: token ids alone, or all that its processor made of a chat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

# token ids, or the arguments of the model's forward by name, and "labels" beside them
Batch = Int[Tensor, "_B _S"] | Mapping[str, Tensor]
IGNORED = -100  # the label of a token that nothing is to predict, as everywhere in transformers


def tokens_of(batch: Batch) -> Int[Tensor, "B S"]:
    """The token ids."""
    return batch if isinstance(batch, Tensor) else batch["input_ids"]


def labels_of(batch: Batch) -> Int[Tensor, "B S"]:
    """The token ids, IGNORED where one stands for a piece of a picture."""
    return batch if isinstance(batch, Tensor) else batch["labels"]


def rows_of(batch: Batch) -> list[Batch]:
    """Sequence by sequence. A chat is one: its pictures belong to the whole."""
    return list(batch.split(1)) if isinstance(batch, Tensor) else [batch]


def n_tokens(batches: Sequence[Batch]) -> int:
    """Of all sequences."""
    return sum(tokens_of(b).numel() for b in batches)


def n_predicted(batches: Sequence[Batch]) -> int:
    """Tokens that have a loss: all but the first of a sequence, and pieces of pictures."""
    return sum(int((labels_of(b)[:, 1:] != IGNORED).sum()) for b in batches)


def shape_of(batches: Sequence[Batch]) -> list[int]:
    """[sequences, tokens of the longest]."""
    tokens = [tokens_of(b) for b in batches]
    return [sum(t.shape[0] for t in tokens), max(t.shape[1] for t in tokens)]


def text_tokens(batch: Batch) -> Int[Tensor, "one S"]:
    """Of the first sequence, without what stands for pictures."""
    labels = labels_of(batch)[:1]
    return tokens_of(batch)[:1][labels != IGNORED][None]


def digest(batches: Sequence[Batch]) -> str:
    """sha256 of everything in them, 16 hex digits."""
    found = hashlib.sha256()
    for batch in batches:
        parts = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        for name, tensor in sorted(parts.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
