"""FlexOlmo."""

from moecule.family import Family

FAMILY = Family("flex_olmo", renormalise="norm_topk_prob", count_keys=("num_experts",))
