"""LFM2 MoE: sigmoid scores, a bias for the choice beside the router."""

from moecule.family import Family

FAMILY = Family(
    "lfm2_moe", scores="sigmoid", renormalise="norm_topk_prob", count_keys=("num_experts",)
)
