"""Granite MoE with sliding windows: routing as in granitemoe."""

from moecule.family import Family

FAMILY = Family("granitemoe_swa", router="router")
