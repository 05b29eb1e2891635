"""Hunyuan-A13B."""

from moecule.family import Family

FAMILY = Family("hunyuan_v1_moe", count_keys=("num_experts",))
