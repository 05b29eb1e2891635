"""OLMoE."""

from moecule.family import Family

FAMILY = Family("olmoe", renormalise="norm_topk_prob", count_keys=("num_experts",))
