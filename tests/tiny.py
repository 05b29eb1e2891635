"""Tiny random models, made on the spot, and what tests do with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import every
import pytest
import torch

# before moecule, whose import under jaxtyping's hook would compile all of these anew
import transformers.core_model_loading
import transformers.generation
import transformers.integrations.moe
import transformers.quantizers  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from moecule.apply import Applied, apply_plan
from moecule.checkpoint import Checkpoint
from moecule.folder import write_config
from moecule.hf import Streamed, auto_class, open_model, set_experts
from moecule.moe import by_expert, experts_of, find_layers, find_moe, put_experts
from moecule.plan import REST, Fate, Keep, Masks, Plan, Skip
from moecule.recipe import part_of
from moecule.walk import Walked, finish, walk
from moecule.writer import SHARD_BYTES, SINGLE_BYTES, Writer

# these are gone through in full; every.py has them all
FAMILIES = (
    "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
# by `make test`: between them they have groups, a bias in the choice, biased and interleaved experts,
# a shared expert, coefficients that are scaled back and some that are not
FEW = ("deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe")
every_family = pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
EXAMPLES = 60  # of hypothesis, by `make test-all`; a third of them by `make test`
VOCABULARY = 300  # room for every byte and the special tokens


def permuted(source: Path, order: Sequence[int], out: Path) -> None:
    """The model with the 8 experts of every layer in another order."""
    model, family = load(source), stream(source).family
    for one in find_layers(model)[1]:
        moe = find_moe(one, family)
        if moe is not None:
            put_experts(moe.experts, experts_of(moe.experts).select(list(order)))
            for module, leaf, axis in by_expert(moe, 8):
                tensor = getattr(module, leaf).data
                getattr(module, leaf).data = tensor.index_select(axis, torch.tensor(order))
    model.save_pretrained(out)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save such a model in its family's own format, and return it."""
    model = every.make(name, **changes).to(dtype)
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer that any text passes through: a token a byte; id 0 ends a text and pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)


def tokens(n: int = 1, seed: int = 0, shape: tuple[int, int] = (2, 20)) -> list[Tensor]:
    """n batches of random token ids."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, shape, generator=g) for _ in range(n)]


def normal(*shape: int) -> Tensor:
    """The same numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def in_eighths(shape: tuple[int, int], seed: int) -> Tensor:
    """Activations that int8 holds exactly: whole eighths, 127 of them in every 32 columns."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, shape, generator=g)
    x[:, ::32] = 127
    return x / 8


def stream(folder: Path, dtype: torch.dtype = torch.float32) -> Streamed:
    """The checkpoint, to walk through."""
    streamed = open_model(Checkpoint.open(folder), dtype, torch.device("cpu"))
    if dtype == torch.float64:  # torch's grouped product has no float64
        set_experts(streamed.model, "eager")
    return streamed


def load(
    folder: Path, dtype: torch.dtype = torch.float32, *, experts: str | None = None, **how: Any
) -> Any:
    """The checkpoint as transformers loads it, its experts run by the function of that name."""
    auto = auto_class(type(AutoConfig.from_pretrained(folder)))
    model = auto.from_pretrained(folder, dtype=dtype, **how).eval()
    if experts is not None:
        set_experts(model, experts)
    return model


@torch.no_grad()
def logits(model: Any, batch: Tensor, **how: Any) -> Tensor:
    """Of one whole pass."""
    out: Tensor = model(batch, use_cache=False, **how).logits
    return out


def walked(streamed: Streamed, batches: Sequence[Tensor], **how: Any) -> Walked:
    """What a walk returns."""
    return finish(walk(streamed, batches, **how))


def moe_layers(streamed: Streamed) -> dict[int, int]:
    """{layer with a MoE block: how many experts it has}."""
    moes = {i: streamed.moe(i) for i in range(len(streamed.layers))}
    return {i: moe.experts.num_experts for i, moe in moes.items() if moe is not None}


def plan(
    streamed: Streamed,
    fate: Callable[[int, int], Fate],
    *,
    rest: Mapping[str, Keep] | None = None,
    encode: str = "rtn",
    skip: Skip | Masks | None = None,
) -> Plan:
    """fate(layer, expert) for every expert; all of the rest stays but what `rest` says."""
    sizes = moe_layers(streamed)
    return Plan(
        model="tiny",
        digest=streamed.checkpoint.digest,
        layers={i: tuple(fate(i, e) for e in range(n)) for i, n in sizes.items()},
        rest=dict.fromkeys(REST, Keep()) | dict(rest or {}),
        encode={"method": encode},
        skip=skip,
    )


def write(
    streamed: Streamed,
    made: Plan,
    out: Path,
    batches: Sequence[Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> Applied:
    """Carry the plan out into `out`, as moecule.apply does but for the check in a fresh process."""
    writer = Writer(out, shard_bytes, min(shard_bytes, SINGLE_BYTES))
    done = apply_plan(streamed, made, part_of("plan", made.encode, "encode"), batches, writer)
    writer.close()
    write_config(out, streamed.checkpoint, streamed.family, made, done)
    return done


def start(processes: int, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """A script, or "-m" and a module, in fresh processes as a user starts them; one thread each."""
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    whole = [sys.executable, *(many if processes > 1 else []), *map(str, command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(whole, capture_output=True, text=True, env=env)
