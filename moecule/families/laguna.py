"""Laguna: sigmoid scores, a bias for the choice only."""

from moecule.family import Family

FAMILY = Family("laguna", scores="sigmoid", count_keys=("num_experts",))
