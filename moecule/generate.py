"""generate: text from a model, compressed or not, and how fast it came."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from moecule.budget import parse_size
from moecule.data import check_text, room_for
from moecule.errors import DataError, RecipeError
from moecule.hf import PACKED
from moecule.measure import device_name
from moecule.offload import Held, Offloaded, offloaded
from moecule.online import experts_run
from moecule.pattern import By, Patterns
from moecule.session import Compute, load, open_checkpoint, tokenizer_of
from moecule.taer import Retrieved, Wanted, retrieve


@dataclass(frozen=True)
class Generated:
    """The answer, and its cost."""

    text: str
    tokens: int
    tokens_per_s: float  # after the prompt
    experts_run: float  # share of (token, expert) pairs
    device: str
    cache: Held | None = None  # of experts, after the prompt
    retrieved: Retrieved | None = None  # by patterns


# CUDA graphs, as transformers would; and small kernels of one step, such as every layer's count of
# the cached tokens, run as one
COMPILE = CompileConfig(mode=None, options={"triton.cudagraphs": True, "combo_kernels": True})
WARM = 4  # tokens after which a step is compiled and captured


@dataclass(frozen=True)
class _After:
    """Stops at so many tokens."""

    length: int

    def __call__(self, ids: Int[Tensor, "B S"], scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= self.length, device=ids.device)


@dataclass(frozen=True)
class _Looking:
    """Stops at nothing; has the expert cache look at what was used, outside of what is compiled."""

    cache: Offloaded
    prompt_tokens: int

    def __call__(self, ids: Int[Tensor, "B S"], scores: Any, **kwargs: Any) -> Tensor:
        if ids.shape[1] == self.prompt_tokens + 1:  # what the prompt used is a beginning
            self.cache.refresh()
            self.cache.forget()
        else:
            self.cache.step()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


class _Pieces(BaseStreamer):  # type: ignore[misc]
    """Hands on text as soon as it is whole: bytes of one letter may come in several tokens."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, say: Callable[[str], None]) -> None:
        self.tokenizer, self.skip, self.say = tokenizer, prompt_tokens, say
        self.ids: list[int] = []
        self.said = 0
        self.first = 0.0

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        if self.skip:  # transformers hands over the prompt first
            self.skip = 0
            return
        self.first = self.first or time.perf_counter()
        self.ids += ids
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self.say(text[self.said :])
            self.said = len(text)

    def end(self) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.say(text[self.said :])


def generate(
    model: str | Path,
    prompt: str,
    *,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    skip: bool = False,
    exact: bool = False,
    compiled: bool = False,
    expert_cache: str | int | None = None,
    patterns: str | Path | None = None,
    experts: int | None = None,
    match: By = "spread",
    compute: Compute | None = None,
    say: Callable[[str], None] = lambda piece: None,
) -> Generated:
    """Up to `tokens` new tokens; `say` gets them as they come. The chat template is used if there is one.

    `exact`: as in `runtime.set_exact`. `compiled`: before the first one, transformers compiles a token's
    step, with a KV cache of fixed size; that takes a minute or two for large models. `expert_cache`:
    experts stay in host memory, and so many bytes of the GPU ("8GB") hold those used most, for compressed
    models that do not fit. `patterns`: a file of `moecule.patterns`; of every layer only `experts` experts
    are loaded, those of the task that the prompt is nearest to by `match` (pattern.py). Temperature 0 takes
    the likeliest token. Raises DataError for a prompt that is empty or too long and for patterns of another
    model, RecipeError for settings that cannot be.
    """
    _check(prompt, tokens, temperature, seed)
    compute = compute or Compute()
    if compiled and compute.torch_device().type != "cuda":
        raise RecipeError("--compile captures CUDA graphs, which needs a GPU; leave it out")
    path, wanted = open_checkpoint(model).path, _wanted(patterns, experts, match, skip)
    cache_bytes = None if expert_cache is None else _cache_bytes(expert_cache, model, compute)
    tokenizer = tokenizer_of(path)
    inputs, retrieved = _inputs(tokenizer, prompt, compute.torch_device()), None
    if wanted is None:
        loaded = load(model, compute, skip=skip, exact=exact, cache_bytes=cache_bytes)
    else:
        loaded, retrieved = retrieve(model, inputs["input_ids"], wanted, compute)
    length, cache = inputs["input_ids"].shape[1], offloaded(loaded)
    looking = [] if cache is None else [_Looking(cache, length)]
    tokens = min(tokens, room_for(inputs["input_ids"], loaded.config))
    pieces = _Pieces(tokenizer, length, say)
    torch.manual_seed(seed)
    how = {**inputs, "max_new_tokens": tokens, **_sampling(tokenizer, temperature)}
    with torch.no_grad():
        if compiled:
            how |= {"cache_implementation": "static", "compile_config": COMPILE}
            loaded.generate(**how, stopping_criteria=[*looking, _After(length + WARM)])
            torch.manual_seed(seed)
        out = loaded.generate(**how, streamer=pieces, stopping_criteria=looking)
    seconds = time.perf_counter() - pieces.first
    new = out[0, length:]
    rate = (len(new) - 1) / seconds if len(new) > 1 else 0.0
    text = tokenizer.decode(new, skip_special_tokens=True)
    held = None if cache is None else cache.held()
    ran, where = experts_run(loaded), device_name(loaded.device)
    return Generated(text, len(new), rate, ran, where, held, retrieved)


def _sampling(tokenizer: Any, temperature: float) -> dict[str, Any]:
    known = tokenizer.pad_token_id
    how = {"pad_token_id": known if known is not None else tokenizer.eos_token_id}
    if temperature > 0:
        return how | {"do_sample": True, "temperature": temperature}
    return how | {"do_sample": False}


def _wanted(
    patterns: str | Path | None, experts: int | None, match: By, skip: bool
) -> Wanted | None:
    """Refused before a model is opened."""
    if (patterns is None) != (experts is None):
        raise RecipeError("--patterns and --experts go together; give both, or neither")
    if match not in get_args(By):
        raise RecipeError(f"match {match!r} is not known; wanted {' or '.join(get_args(By))}")
    if patterns is None or experts is None:
        return None
    if skip:
        raise RecipeError(
            "--skip is of a compressed model, and --patterns of an original; leave one out"
        )
    return Wanted(Patterns.load(patterns), experts, match)


def _cache_bytes(expert_cache: str | int, model: str | Path, compute: Compute) -> int:
    """Refused before a model is loaded."""
    size = parse_size(expert_cache)
    if compute.torch_device().type != "cuda":
        raise RecipeError("--expert-cache is of a GPU's memory, and there is none; leave it out")
    if open_checkpoint(model).config["model_type"] != PACKED:
        raise RecipeError(
            f"{model} is not compressed, and --expert-cache holds packed experts; compress it, or "
            "leave it out"
        )
    return size


def _inputs(tokenizer: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return {k: v for k, v in inputs.to(device).items() if k in ("input_ids", "attention_mask")}


def _check(prompt: str, tokens: int, temperature: float, seed: int) -> None:
    if not prompt.strip():
        raise DataError("the prompt is empty; give some text to go on from")
    check_text(prompt, "the prompt")
    if tokens < 1:
        raise RecipeError(f"{tokens} new tokens were asked for; wanted 1 or more")
    if not 0 <= temperature < math.inf:
        raise RecipeError(f"temperature {temperature:g}; wanted 0, or a number above it")
    if not 0 <= seed < 2**63:
        raise RecipeError(f"seed {seed}; wanted a whole number from 0 to 2^63 - 1")
