"""Qwen4-exp: routing as in Qwen3-Next."""

from moecule.family import Family

FAMILY = Family("qwen4_exp", renormalise="norm_topk_prob", count_keys=("num_experts",))
