"""Qwen3-Omni's thinker: routing as in Qwen3-MoE."""

from moecule.family import Family

FAMILY = Family("qwen3_omni_moe_thinker", renormalise="norm_topk_prob", count_keys=("num_experts",))
