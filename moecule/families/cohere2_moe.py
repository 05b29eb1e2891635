"""Command A, MoE: config.json says how the chosen logits become coefficients."""

from moecule.family import Family

FAMILY = Family(
    "cohere2_moe",
    scores="expert_selection_fn",
    renormalise="norm_topk_prob",
    count_keys=("num_experts",),
)
