"""Qwen1.5-MoE and Qwen2-MoE: with a shared expert behind a gate of its own."""

from moecule.family import Family

FAMILY = Family("qwen2_moe", renormalise="norm_topk_prob", count_keys=("num_experts",))
