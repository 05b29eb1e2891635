"""Kolibri 1: sigmoid of the chosen logits."""

from moecule.family import Family

FAMILY = Family(
    "kolibri1",
    scores="sigmoid",
    renormalise="norm_topk_prob",
    count_keys=("num_experts", "num_local_experts"),
)
