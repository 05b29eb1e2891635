"""Phi-3.5-MoE: SparseMixer; each coefficient is a softmax over logits near the largest left."""

from moecule.family import Family

FAMILY = Family("phimoe", router="router", renormalise=False)
