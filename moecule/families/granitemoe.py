"""Granite 3 MoE: softmax over the chosen logits."""

from moecule.family import Family

FAMILY = Family("granitemoe", router="router", since="5.18")
