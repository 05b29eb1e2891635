"""MiMo-V2-Flash: routing as in DeepSeek-V3."""

from moecule.family import Family

FAMILY = Family(
    "mimo_v2_flash",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("n_routed_experts",),
    groups="n_group",
)
