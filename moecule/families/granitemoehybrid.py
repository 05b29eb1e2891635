"""Granite 4: routing as in granitemoe."""

from moecule.family import Family

FAMILY = Family("granitemoehybrid", router="router", since="5.18")
