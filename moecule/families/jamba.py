"""Jamba: coefficients are not to sum to 1."""

from moecule.family import Family

FAMILY = Family(
    "jamba", router="router", renormalise=False, count_keys=("num_experts",), since="5.21"
)
