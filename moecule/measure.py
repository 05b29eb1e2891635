"""Losses and speed of a loaded model.

Perplexity convention: the text is tokenised once without special tokens, cut into non-overlapping
windows of min(2048, max_position_embeddings) tokens, each starting cold; S - 1 predictions a
window; the loss is the mean over windows, in nats a token; perplexity = exp(loss).
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor, nn

from moecule.batch import IGNORED, Batch, labels_of, rows_of
from moecule.errors import DataError, RecipeError
from moecule.hf import Streamed

SPEED_TOKENS = 32  # decoded one by one for the speed figure
PASS_TOKENS = 2048  # of prompts that pass together, where many sequences do
MOST_WINDOWS = 128  # of a text whose nats are kept each by itself
RATE_BYTES = {"cuda": 2**28, "cpu": 2**27}  # read for the rate: more than most caches hold


@dataclass(frozen=True)
class Loss:
    """Of one text; all are means over its tokens."""

    loss_nats: float
    tokens: int
    kl_nats: float | None = None  # of the original's distribution against this one's
    top1_agreement: float | None = None  # share of tokens whose likeliest next token is the same
    original_loss_nats: float | None = None
    # of each window in order, or of runs of as many where there are more than MOST_WINDOWS: tokens
    # with a loss, and their nats in all; two models' make a paired interval
    window_tokens: tuple[int, ...] = ()
    window_nats: tuple[float, ...] = ()


@dataclass(frozen=True)
class Throughput:
    """Decoding at once as many sequences as a memory holds beside the weights."""

    memory_bytes: int
    context_tokens: int  # of each sequence
    weight_bytes: int  # of all tensors as on disk
    sequence_bytes: int  # of the KV cache of one, numbers of 16 bits
    sequences: int  # that fit
    decode_tokens_per_s: float | None  # of all together; None: none fits, or not here
    peak_memory_bytes: int | None  # of the device, activations and all; None: not known on a CPU


def window_losses(model: Any, windows: Int[Tensor, "N S"], batch: int = 8) -> Float[Tensor, " N"]:
    """Mean next-token loss of each window, nats."""
    out = []
    for part in windows.split(batch):
        out.append(_token_losses(_logits(model, part), part).mean(-1).cpu())
    return torch.cat(out)


@torch.no_grad()
def _logits(model: Any, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
    out: Tensor = model(tokens.to(model.device), use_cache=False).logits
    return out.float()


def _token_losses(
    logits: Float[Tensor, "B S V"], labels: Int[Tensor, "B S"]
) -> Float[Tensor, "B S1"]:
    """Zero where nothing is to be predicted."""
    target = labels[:, 1:].to(logits.device)
    return nn.functional.cross_entropy(
        logits[:, :-1].mT, target, reduction="none", ignore_index=IGNORED
    )


@torch.no_grad()
def batch_sums(
    streamed: Streamed,
    hidden: Float[Tensor, "B S *H"],
    batch: Batch,
    original: tuple[Streamed, Float[Tensor, "B S *H"]] | None = None,
) -> Float64[Tensor, "N four"]:
    """Of each sequence, from what the last layers gave: loss, the original's, KL, tokens alike; summed.

    A conversation counts as one sequence.
    """
    rows = rows_of(batch)  # the logits of a whole batch may not fit
    sums = torch.zeros(len(rows), 4, dtype=torch.float64)
    size = len(hidden) // len(rows)
    for at, one in enumerate(rows):
        here = slice(at * size, (at + 1) * size)
        logits, labels = streamed.logits(hidden[here], one), labels_of(one)
        sums[at, 0] = _token_losses(logits, labels).double().sum().cpu()
        if original is not None:
            theirs = original[0].logits(original[1][here], one)
            sums[at, 1] = _token_losses(theirs, labels).double().sum().cpu()
            some = (labels[:, 1:] != IGNORED).to(logits.device)
            p, q = theirs[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
            kl = nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            sums[at, 2] = kl[some].double().sum().cpu()
            sums[at, 3] = (p.argmax(-1) == q.argmax(-1))[some].double().sum().cpu()
    return sums


def loss_of(sums: Float64[Tensor, "N four"], tokens: Int64[Tensor, " N"], *, against: bool) -> Loss:
    """The means of `batch_sums` over `tokens`, which each sequence has with a loss.

    Raises DataError where the loss is not finite.
    """
    n = int(tokens.sum())
    loss, theirs, kl, same = (sums.sum(0) / n).tolist()
    if not math.isfinite(loss):
        raise DataError(
            "the loss is not finite; the checkpoint is damaged, or needs a wider dtype (--dtype float32)"
        )
    found = Loss(loss, n, kl, same, theirs) if against else Loss(loss, n)
    parts = [p for p in torch.arange(len(tokens)).tensor_split(MOST_WINDOWS) if len(p)]
    return replace(
        found,
        window_tokens=tuple(int(tokens[p].sum()) for p in parts),
        window_nats=tuple(round(float(sums[p, 0].sum()), 4) for p in parts),
    )


def original_loss_of(sums: Float64[Tensor, "N four"], tokens: Int64[Tensor, " N"]) -> Loss:
    """The original's, of the same sums."""
    theirs = sums[:, 1]
    itself = torch.stack([theirs, theirs, torch.zeros_like(theirs), tokens.double()], dim=1)
    return loss_of(itself, tokens, against=True)


@torch.no_grad()
def speed(model: Any, prompt: Int[Tensor, "one S"]) -> tuple[float, float]:
    """(prompt tokens/s of one window, tokens/s decoded one by one with a cache), after warming up."""
    prompt = prompt.to(model.device)
    model(prompt, use_cache=False)
    prefill = _timed(model.device, lambda: model(prompt, use_cache=False))
    cache = model(prompt[:, :8], use_cache=True).past_key_values
    token = prompt[:, 8:9] if prompt.shape[1] > 8 else prompt[:, :1]
    model(token, past_key_values=cache, use_cache=True)  # kernels for one token are compiled

    def decode() -> None:
        for _ in range(SPEED_TOKENS):
            model(token, past_key_values=cache, use_cache=True)

    return prompt.shape[1] / prefill, SPEED_TOKENS / _timed(model.device, decode)


@torch.no_grad()
def decode_rate(model: Any, tokens: Int[Tensor, "N S"]) -> float:
    """tokens/s of all N sequences together, decoding the last SPEED_TOKENS with a full cache.

    Prompts pass a few tokens of every sequence at a time. Raises RecipeError where the device has no
    room for the activations.
    """
    n, length = tokens.shape
    first = length - SPEED_TOKENS
    assert first >= 2
    tokens = tokens.to(model.device)
    how: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        how["logits_to_keep"] = 1
    cache = None
    try:
        for part in tokens[:, : first - 1].split(max(1, PASS_TOKENS // n), dim=1):
            cache = model(part, past_key_values=cache, **how).past_key_values
        steps = tokens[:, first - 1 :].split(1, dim=1)
        model(steps[0], past_key_values=cache, **how)  # kernels for one token each are compiled

        def decode() -> None:
            for step in steps[1:]:
                model(step, past_key_values=cache, **how)

        return n * SPEED_TOKENS / _timed(model.device, decode)
    except torch.OutOfMemoryError as e:
        raise RecipeError(
            f"the device has no room for what {n} sequences compute; give --memory less"
        ) from e


@functools.cache
def read_rate(device: torch.device) -> float:
    """Bytes/s at which the device adds up a large tensor: what bounds decoding, which reads weights.

    Measured once a process.
    """
    numbers = torch.ones(RATE_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    numbers.sum()
    best = min(_timed(device, numbers.sum) for _ in range(3))
    return RATE_BYTES[device.type] / best


def _timed(device: torch.device, work: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0] if models else ''}, {torch.get_num_threads()} threads"


def confidence(differences: Float[Tensor, " N"]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of paired differences, by the normal approximation."""
    n = len(differences)
    return float(differences.mean()), float(1.96 * differences.std() / n**0.5)
