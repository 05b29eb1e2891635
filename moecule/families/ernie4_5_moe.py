"""ERNIE 4.5: softmax, a bias for the choice only."""

from moecule.family import Family

FAMILY = Family("ernie4_5_moe", count_keys=("moe_num_experts",))
