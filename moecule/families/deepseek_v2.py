"""DeepSeek-V2: shared experts, coefficients scaled by a constant and not to sum to 1."""

from moecule.family import Family

FAMILY = Family(
    "deepseek_v2", renormalise=False, count_keys=("n_routed_experts",), groups="n_group"
)
