"""Hunyuan 3: sigmoid scores, a bias for the choice beside the router."""

from moecule.family import Family

FAMILY = Family("hy_v3", scores="sigmoid", count_keys=("num_experts",))
