"""Trinity (AFMoE): sigmoid scores, a bias for the choice beside the router."""

from moecule.family import Family

FAMILY = Family("afmoe", router="router", scores="sigmoid", count_keys=("num_experts",))
