"""MiniMax-Text-01: routing as in Mixtral."""

from moecule.family import Family

FAMILY = Family("minimax")
