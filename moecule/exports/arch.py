"""What llama.cpp's code for a family takes for granted, and what a file must tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGUFWriter,
    RopeScalingType,
)

from moecule.errors import PlanError
from moecule.exports.contents import Contents
from moecule.moe import find_layers, find_moe


@dataclass(frozen=True)
class Arch:
    """What llama.cpp's code for a family takes for granted."""

    arch: MODEL_ARCH
    renormalised: bool  # the chosen coefficients sum to 1
    interleaved: bool = False  # rotary pairs are neighbours: rows of q and k change places
    own_width: bool = True  # experts have a width apart from dense layers'
    square: bool = False  # heads are as wide as the model, and the head is not tied
    alike: bool = False  # as many keys as queries


ARCHES = {
    "mixtral": Arch(MODEL_ARCH.LLAMA, True, interleaved=True, own_width=False),
    "olmoe": Arch(MODEL_ARCH.OLMOE, False, own_width=False, square=True, alike=True),
    "qwen2_moe": Arch(MODEL_ARCH.QWEN2MOE, False, square=True),
    "qwen3_moe": Arch(MODEL_ARCH.QWEN3MOE, True),
}


def check_model(contents: Contents) -> Arch:
    """llama.cpp's code for the model. Raises PlanError where it would compute something else."""
    family, settings = contents.family, contents.settings
    instead = "export --to transformers, and use llama.cpp's convert_hf_to_gguf.py on that"
    if family.model_type not in ARCHES:
        raise PlanError(
            f"GGUF is written for {', '.join(ARCHES)}, and this is {family.model_type}; {instead}"
        )
    arch = ARCHES[family.model_type]
    rope = getattr(settings, "rope_parameters", None) or {}
    dense = [i for i in range(contents.n_layers) if not _has_experts(contents, i)]
    head = settings.num_attention_heads * _head_dim(settings)
    found = {
        "another activation than silu": settings.hidden_act != "silu",
        "other coefficients": family.is_renormalised(settings) != arch.renormalised,
        "a sliding window": bool(getattr(settings, "sliding_window", None))
        and getattr(settings, "use_sliding_window", True),
        "clipped projections": getattr(settings, "clip_qkv", None) is not None,
        f"{rope.get('rope_type')} rotary positions": rope.get("rope_type", "default")
        not in ("default", "linear"),
        "layers without experts": bool(dense),
        "fewer keys than queries": arch.alike
        and settings.num_key_value_heads != settings.num_attention_heads,
        "heads of another width than the model": arch.square and head != settings.hidden_size,
    }
    wrong = [what for what, is_so in found.items() if is_so]
    if wrong:
        raise PlanError(
            f"this {family.model_type} has {wrong[0]}, which llama.cpp's {MODEL_ARCH_NAMES[arch.arch]} "
            f"does not know; {instead}"
        )
    return arch


def _has_experts(contents: Contents, i: int) -> bool:
    return find_moe(find_layers(contents.model)[1][i], contents.family) is not None


def _head_dim(settings: Any) -> int:
    given = getattr(settings, "head_dim", None)
    return int(given or settings.hidden_size // settings.num_attention_heads)


def add_settings(
    writer: GGUFWriter, contents: Contents, arch: Arch, experts: int, channels: int
) -> None:
    """The file's metadata, but for the tokenizer; `experts` of a layer, `channels` of an expert."""
    settings, head = contents.settings, _head_dim(contents.settings)
    rope = settings.rope_parameters
    writer.add_name(contents.checkpoint.path.name)
    writer.add_quantized_by("moecule")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(settings.vocab_size)
    writer.add_block_count(contents.n_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size if arch.own_width else channels)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(settings.num_experts_per_tok)
    if arch.own_width:
        writer.add_expert_feed_forward_length(channels)
    if shared := getattr(settings, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)
