"""MiniMax-M2: sigmoid scores, a bias for the choice beside the router."""

from moecule.family import Family

FAMILY = Family("minimax_m2", scores="sigmoid")
