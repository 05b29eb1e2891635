"""GLM-4.5V: routing as in DeepSeek-V3."""

from moecule.family import Family

FAMILY = Family(
    "glm4v_moe",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("n_routed_experts",),
    groups="n_group",
)
