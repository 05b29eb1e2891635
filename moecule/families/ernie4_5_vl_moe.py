"""ERNIE 4.5 VL."""

from moecule.family import Family

FAMILY = Family("ernie4_5_vl_moe", count_keys=("moe_num_experts",))
