"""Qwen3.5-MoE: vision, linear attention, a shared expert behind a gate of its own."""

from moecule.family import Family

FAMILY = Family("qwen3_5_moe", count_keys=("num_experts",))
