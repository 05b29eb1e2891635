"""Kimi Linear: routing as in DeepSeek-V3."""

from moecule.family import Family

FAMILY = Family(
    "kimi_linear",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("num_experts",),
    groups="n_group",
)
