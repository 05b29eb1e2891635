"""Beam: routing as in DeepSeek-V3, scaled after the experts."""

from moecule.family import Family

FAMILY = Family(
    "beam",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("num_experts",),
    groups="n_group",
)
