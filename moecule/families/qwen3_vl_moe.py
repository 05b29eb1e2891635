"""Qwen3-VL-MoE. transformers writes num_local_experts where the hub's files say num_experts."""

from moecule.family import Family

FAMILY = Family("qwen3_vl_moe", count_keys=("num_experts", "num_local_experts"))
