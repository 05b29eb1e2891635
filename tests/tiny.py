"""Tiny random models of every family, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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


def save(name: str, folder: Path, **changes: Any) -> Any:
    """Save such a model in its family's own format, and return it."""
    model = make(name, **changes)
    model.save_pretrained(folder)
    return model


def tokens(n: int = 1, seed: int = 0, shape: tuple[int, int] = (2, 20)) -> list[torch.Tensor]:
    """n batches of random token ids."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, shape, generator=g) for _ in range(n)]
