"""Inkling 2: config.json names the scores."""

from moecule.family import Family

FAMILY = Family("inkling2", scores="scoring_func", count_keys=("n_routed_experts",))
