"""Gemma 4: the router gives probabilities, and scales what it chose by expert."""

from moecule.family import Family

FAMILY = Family(
    "gemma4", router="router", scores="probability", renormalise=False, count_keys=("num_experts",)
)
