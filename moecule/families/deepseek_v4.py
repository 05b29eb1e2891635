"""DeepSeek-V4: config.json names the scores; the first layers choose by token."""

from moecule.family import Family

FAMILY = Family("deepseek_v4", scores="scoring_func", count_keys=("n_routed_experts",))
