"""A tiny random model of every family that transformers' experts interface serves: settings, as data."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as CONFIGS

BASE: dict[str, Any] = {
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
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
HANDED = {"indexer_types": ["full", "shared", "full"]}
INDEXER = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 8}
STREAMS = {"hc_mult": 2, "hc_sinkhorn_iters": 2}
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SHARED = {"shared_expert_intermediate_size": 24}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], **SHARED,
}  # fmt: skip
DELTA = {"linear_head_dim": 8, "linear_num_heads": 4, "linear_conv_kernel_dim": 2}
INKLING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4,
    "rel_extent": 16, "sliding_window_size": 8, "conv_kernel_size": 2,
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PATCHES = {**TOWER, "patch_size": 4, "image_size": 16}
DEEP = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 32, "num_position_embeddings": 16,
}  # fmt: skip
GEMMA = {
    **TOWER,
    "patch_size": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "position_embedding_size": 16,
}
SAM = {
    "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 64, "mlp_dim": 16, "downsample_channels": [8, 16], "global_attn_indexes": [0],
}  # fmt: skip


def text(**settings: Any) -> dict[str, Any]:
    """Of the text part of a model: the base, and what differs."""
    return {k: v for k, v in {**BASE, **settings}.items() if v is not None}


def rope(*section: int, **more: float) -> dict[str, Any]:
    """Rotary positions in three axes."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}


MODELS: dict[str, dict[str, Any]] = {
    "afmoe": {"num_experts": 8, "num_dense_layers": 1, "num_shared_experts": 1, **SLIDING},
    "aria": {
        "text_config": text(
            model_type="aria_text", moe_num_experts=8, moe_topk=2, intermediate_size=16,
            moe_num_shared_experts=1,
        ),
        "vision_config": {"model_type": "idefics3_vision", **PATCHES},
        "projector_patch_to_query_dict": {16: 4},
    },
    "axk1": {**MLA, **GROUPS},
    "axk2": {**MLA, **GROUPS, **INDEXER},
    "bailing_hybrid": {
        **MLA, **GROUPS, "num_experts": 8, "layer_group_size": 2, "head_dim": 8, "num_mtp_layers": 0,
    },
    "beam": {"num_experts": 8, **GROUPS, **DENSE_FIRST},
    "cohere2_moe": {"num_experts": 8, "intermediate_size": 16, "num_shared_experts": 1, **SLIDING},
    "deepseek_ocr2": {
        "text_config": text(
            **GROUPS | {"n_group": None, "topk_group": None}, topk_method="greedy", **DENSE_FIRST
        ),
        "vision_config": {
            "sam_config": SAM,
            "encoder_config": {**TOWER, "num_key_value_heads": 2, "vocab_size": 8},
        },
    },
    "deepseek_v2": {**MLA, **GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**MLA, **GROUPS},
    "deepseek_v32": {**MLA, **GROUPS, **INDEXER},
    "deepseek_v4": {
        **GROUPS, **INDEXER, **STREAMS, "num_key_value_heads": 1, "q_lora_rank": 16, "o_groups": 2,
        "o_lora_rank": 8, "sliding_window": 8,
    },
    "diffusion_gemma": {
        "text_config": text(num_experts=8, top_k_experts=2, layer_types=["full_attention"] * 3),
        "vision_config": {"model_type": "gemma4_vision", **GEMMA},
        "canvas_length": 20,
    },
    "dots1": {**GROUPS},
    "dots3_note": {
        "text_config": text(**MLA | GROUPS | INDEXER, layer_types=["full_attention"] * 3),
        "vision_config": {
            **TOWER, "patch_size": 4, "moe_intermediate_size": 8, "num_local_experts": 4,
            "mlp_layer_types": ["dense"], "per_layer_config": {}, "adapter_in_dim": 16,
            "adapter_out_dim": 32,
        },
        "audio_config": {
            **TOWER, "downsample_hidden_size": 4, "adapter_input_size": 16, "adapter_out_dim": 32,
            "feature_size": 8,
        },
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "text_config": text(
            moe_num_experts=8, moe_k=2, moe_intermediate_size=[16, 8], moe_num_shared_experts=1,
            num_experts_per_tok=None, rope_parameters=rope(1, 1, 2),
        ),
        "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16},
    },
    "exaone_moe": {
        **GROUPS, **DENSE_FIRST, **SLIDING, "num_experts": 8, "num_shared_experts": 1,
    },
    "flex_olmo": {"num_experts": 8, "intermediate_size": 16},
    "flint": {"num_experts": 8, "mlp_only_layers": [0], **SHARED, **SLIDING},
    "gemma4": {
        "text_config": text(
            num_experts=8, enable_moe_block=True, top_k_experts=2, vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=4, global_head_dim=8, **SLIDING,
        ),
        "vision_config": GEMMA,
    },
    "glm4_moe": {**GROUPS},
    "glm4_moe_lite": {**MLA, **GROUPS},
    "glm4v_moe": {
        "text_config": text(**GROUPS, rope_parameters=rope(1, 1, 0, partial_rotary_factor=0.5)),
        "vision_config": {**DEEP, "image_size": 16},
    },
    "glm5_next": {
        "text_config": text(
            **MLA | GROUPS | INDEXER | STREAMS | DELTA | {"qk_rope_head_dim": 0, "head_dim": 0},
            index_kpool=4, **DENSE_FIRST, **HANDED,
            layer_types=["full_attention", "full_attention", "linear_attention"],
        ),
        "vision_config": {**DEEP, "image_size": 16, "projection_intermediate_size": 16},
    },
    "glm_moe_dsa": {**MLA, **GROUPS, **INDEXER, **HANDED},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 16, **SLIDING},
    "granitemoe": {
        "num_local_experts": 8, "intermediate_size": 16, "logits_scaling": 2.0,
        "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    },
    "granitemoe_swa": {
        "num_local_experts": 8, "intermediate_size": 16, "shared_intermediate_size": 24,
    },
    "granitemoehybrid": {
        "num_local_experts": 8, "intermediate_size": 16, "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention", "mamba"], **MAMBA,
    },
    "granitemoeshared": {
        "num_local_experts": 8, "intermediate_size": 16, "shared_intermediate_size": 24,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "intermediate_size": 16},
    "hy_v3": {"num_experts": 8, "first_k_dense_replace": 1, "num_shared_experts": 1},
    "hy_v4": {**MLA, **GROUPS, **INDEXER, **HANDED, **STREAMS, "head_dim": 8},
    "inkling2": {
        "text_config": text(
            **INKLING, n_routed_experts=8, unpadded_vocab_size=64, intermediate_size=None,
            n_layers_per_attn_res_block=2,
        ),
        "vision_config": {
            **TOWER, "patch_size": 4, "posemb_grid_size": 4, "projection_hidden_dim": 16,
            "text_hidden_size": 32,
        },
    },
    "inkling_mm_model": {
        "text_config": text(**INKLING, **GROUPS | {"n_shared_experts": 2}, **DENSE_FIRST),
        "vision_config": {**TOWER, "text_hidden_size": 32},
        "audio_config": {"text_hidden_size": 32, "n_mel_bins": 4, "mel_vocab_size": 8},
    },
    "jamba": {
        "num_experts": 8, "intermediate_size": 16, "num_hidden_layers": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
    "kimi_linear": {**MLA, **GROUPS, **DELTA, "num_experts": 8, "q_lora_rank": None},
    "kolibri1": {"num_experts": 8, **SHARED, **SLIDING},
    "laguna": {"num_experts": 8, **SHARED, **DENSE_FIRST, **SLIDING},
    "lfm2_moe": {
        "num_experts": 8, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
    },
    "mellum": {"num_experts": 8},
    "mimo_v2_flash": {**GROUPS, **DENSE_FIRST, **SLIDING, "v_head_dim": 8},
    "minimax": {"num_local_experts": 8, "intermediate_size": 16, "block_size": 8},
    "minimax_m2": {"num_local_experts": 8, "intermediate_size": 16},
    "minimax_m3_vl": {
        "text_config": text(
            num_local_experts=8, intermediate_size=16, dense_intermediate_size=24,
            shared_intermediate_size=24, rotary_dim=4, index_n_heads=2, index_head_dim=8,
            index_block_size=4, index_topk_blocks=4, **DENSE_FIRST,
        ),
        "vision_config": {**PATCHES, "temporal_patch_size": 1},
        "projector_hidden_size": 16,
    },
    "mistral4": {**MLA, **GROUPS},
    "mistral_large4": {
        "text_config": text(**MLA | GROUPS | INDEXER),
        "vision_config": {"model_type": "pixtral", **PATCHES},
    },
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16},
    "muse_spark": {
        "text_config": text(num_local_experts=8, moe_hidden_size=16, sliding_window=8),
        "vision_config": {**TOWER, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
        "audio_config": {
            "patch_sizes": [16, 6, 5, 4], "hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1],
            "out_hidden_size": 32,
        },
        "out_hidden_size": 32, "projector_hidden_size": 16,
    },
    "nemotron_h": {
        **GROUPS, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2,
        "moe_shared_expert_intermediate_size": 24, "num_hidden_layers": None,
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "use_mamba_kernels": False,
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 16, "norm_topk_prob": True},
    "openai_privacy_filter": {
        "num_local_experts": 8, "intermediate_size": 16, "sliding_window": 8,
    },
    "phimoe": {"num_local_experts": 8, "intermediate_size": 16},
    "qwen2_moe": {"num_experts": 8, "decoder_sparse_step": 1, **SHARED},
    "qwen3_5_moe": {"text_config": text(num_experts=8, **LINEAR), "vision_config": DEEP},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "qwen3_next": {"num_experts": 8, **LINEAR},
    "qwen3_omni_moe_thinker": {
        "text_config": text(num_experts=8, norm_topk_prob=True),
        "vision_config": {**DEEP, "deepstack_visual_indexes": [0]},
        "audio_config": {
            "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16, "d_model": 16, "output_dim": 32, "downsample_hidden_size": 4,
            "max_source_positions": 16,
        },
    },
    "qwen3_vl_moe": {
        "text_config": text(num_experts=8),
        "vision_config": {**DEEP, "deepstack_visual_indexes": [0]},
    },
    "qwen4_exp": {
        "text_config": text(
            num_experts=8, hc_count=2, hc_lowrank=8, ngram_vocab_size_base=64,
            make_ngram_vocab_size_divisible_by=8, heads_per_ngram=2, split_ngram_parts=2,
            ple_embed_dim=8, ple_layer_ids=[1], indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8,
            indexer_budget=8, indexer_compress_ratio=4, **LINEAR,
        ),
        "vision_config": DEEP,
    },
    "solar_open": {**GROUPS},
    "unlimited_ocr": {
        "text_config": text(**GROUPS, sliding_window=8),
        "vision_config": {"sam_config": SAM, "encoder_config": PATCHES},
    },
    "zaya": {"num_experts": 8, "num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip


def is_new_enough(model_type: str) -> bool:
    """Whether this transformers is one that the family is served with."""
    from moecule.family import load_family

    return Version(transformers.__version__) >= Version(load_family(model_type).since)


def known() -> list[str]:
    """Those of MODELS that this transformers has."""
    return [t for t in MODELS if t in CONFIGS]


def config(model_type: str, **changes: Any) -> Any:
    """The tiny config of the family; `changes` are of its text part."""
    settings = MODELS[model_type]
    if "text_config" in settings:
        whole = settings | {"text_config": settings["text_config"] | changes}
    else:
        whole = text(**settings | changes)
    return AutoConfig.for_model(model_type, **copy.deepcopy(whole))


def make(model_type: str, **changes: Any) -> Any:
    """A float32 model of the family, with weights large enough that routing is not a tie."""
    from moecule.catalogue import head_of  # after what tiny.py imports before moecule

    torch.manual_seed(0)
    head = getattr(transformers, head_of(model_type) or "")
    model = head._from_config(config(model_type, **changes)).eval().float()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
        for n, b in [*model.named_buffers(), *model.named_parameters()]:
            if n.endswith(("e_score_correction_bias", "expert_bias")):
                b.normal_(0, 0.05)
    return model


@torch.no_grad()
def logits(model: Any, batch: Tensor) -> Tensor:
    """Of one whole pass."""
    out: Tensor = model(batch, use_cache=False).logits
    return out
