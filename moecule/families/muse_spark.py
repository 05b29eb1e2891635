"""Muse Spark: sigmoid scores; experts in a narrower space, each with a norm at its end."""

from moecule.family import Family

FAMILY = Family("muse_spark", scores="sigmoid")
