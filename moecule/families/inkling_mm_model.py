"""Inkling: shared experts take part in the scaling, so what is routed sums to less."""

from moecule.family import Family

FAMILY = Family(
    "inkling_mm_model", scores="sigmoid", renormalise=False, count_keys=("n_routed_experts",)
)
