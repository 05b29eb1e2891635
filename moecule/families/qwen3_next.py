"""Qwen3-Next: linear attention, a shared expert behind a gate of its own."""

from moecule.family import Family

FAMILY = Family("qwen3_next", renormalise="norm_topk_prob", count_keys=("num_experts",))
