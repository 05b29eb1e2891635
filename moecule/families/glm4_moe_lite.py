"""GLM-4.7-Flash: routing as in DeepSeek-V3."""

from moecule.family import Family

FAMILY = Family(
    "glm4_moe_lite",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("n_routed_experts",),
    groups="n_group",
)
