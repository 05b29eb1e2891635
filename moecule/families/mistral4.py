"""Mistral 4: softmax, groups chosen first."""

from moecule.family import Family

FAMILY = Family(
    "mistral4", renormalise="norm_topk_prob", count_keys=("n_routed_experts",), groups="n_group"
)
