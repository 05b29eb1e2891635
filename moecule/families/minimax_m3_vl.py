"""MiniMax-M3: sigmoid scores, a bias for the choice only."""

from moecule.family import Family

FAMILY = Family("minimax_m3_vl", scores="sigmoid")
