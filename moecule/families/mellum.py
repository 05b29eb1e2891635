"""Mellum 2: routing as in Qwen3-MoE."""

from moecule.family import Family

FAMILY = Family(
    "mellum", renormalise="norm_topk_prob", count_keys=("num_experts", "num_local_experts")
)
