"""K-EXAONE: routing as in DeepSeek-V3."""

from moecule.family import Family

FAMILY = Family(
    "exaone_moe",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("num_experts",),
    groups="n_group",
)
