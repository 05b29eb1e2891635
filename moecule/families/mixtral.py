"""Mixtral: softmax over all experts, the top ones scaled to sum to 1."""

from moecule.family import Family

FAMILY = Family("mixtral")
