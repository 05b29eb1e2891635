"""ZAYA1: one expert a token, or none."""

from moecule.family import Family

FAMILY = Family("zaya", renormalise=False, count_keys=("num_experts",))
