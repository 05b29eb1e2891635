"""Granite MoE with a shared expert: routing as in granitemoe."""

from moecule.family import Family

FAMILY = Family("granitemoeshared", router="router", since="5.18")
