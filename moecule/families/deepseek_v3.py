"""DeepSeek-V3: sigmoid scores, a bias for the choice only, groups chosen first."""

from moecule.family import Family

FAMILY = Family(
    "deepseek_v3",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("n_routed_experts",),
    groups="n_group",
)
