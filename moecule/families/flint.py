"""Flint: sigmoid scores."""

from moecule.family import Family

FAMILY = Family(
    "flint", scores="sigmoid", renormalise="norm_topk_prob", count_keys=("num_experts",)
)
