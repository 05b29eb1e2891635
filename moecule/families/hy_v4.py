"""Hunyuan 4: routing as in DeepSeek-V3; layers hand on what their indexers chose."""

from moecule.family import Family

FAMILY = Family(
    "hy_v4",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("n_routed_experts",),
    groups="n_group",
    takes="prev_topk_indices",
)
