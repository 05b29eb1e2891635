"""Tiny random models of every family, made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# before moecule, whose import under jaxtyping's hook would compile all of these anew
import transformers.core_model_loading
import transformers.generation
import transformers.integrations.moe
import transformers.quantizers  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moecule.apply import Applied, apply_plan
from moecule.checkpoint import Checkpoint
from moecule.folder import write_config
from moecule.hf import Streamed, open_model
from moecule.plan import REST, Fate, Keep, Plan, Skip
from moecule.recipe import part_of
from moecule.walk import Walked, finish, walk
from moecule.writer import SHARD_BYTES, SINGLE_BYTES, Writer

BASE = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 64, "max_position_embeddings": 128, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": None,
}  # fmt: skip
GROUPS = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**MLA, **GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**MLA, **GROUPS},
    "glm4_moe": {**GROUPS},
    "gpt_oss": {
        "num_local_experts": 8, "intermediate_size": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16},
    "olmoe": {"num_experts": 8, "intermediate_size": 16, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True, "decoder_sparse_step": 1},
}  # fmt: skip
VOCABULARY = 300  # room for every byte and the special tokens


def make(name: str, **changes: Any) -> Any:
    """A float32 model of the family, with weights large enough that routing is not a tie."""
    settings = {k: v for k, v in {**BASE, **FAMILIES[name], **changes}.items() if v is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval().float()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
        for n, b in model.named_buffers():
            if n.endswith("e_score_correction_bias"):
                b.normal_(0, 0.05)
    return model


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save such a model in its family's own format, and return it."""
    model = make(name, **changes).to(dtype)
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


def stream(folder: Path, dtype: torch.dtype = torch.float32) -> Streamed:
    """The checkpoint, to walk through."""
    streamed = open_model(Checkpoint.open(folder), dtype, torch.device("cpu"))
    if dtype == torch.float64:  # torch's grouped product has no float64
        streamed.model.set_experts_implementation("eager")
    return streamed


def load(folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    """The checkpoint as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


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
    skip: Skip | None = None,
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
