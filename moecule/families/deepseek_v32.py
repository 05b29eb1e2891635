"""DeepSeek-V3.2: routing as in DeepSeek-V3."""

from moecule.family import Family

FAMILY = Family(
    "deepseek_v32",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("n_routed_experts",),
    groups="n_group",
)
