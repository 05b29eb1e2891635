"""Mistral Large 4: softmax, groups chosen first."""

from moecule.family import Family

FAMILY = Family("mistral_large4", count_keys=("n_routed_experts",), groups="n_group")
