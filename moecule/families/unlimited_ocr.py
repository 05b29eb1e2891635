"""Unlimited-OCR: routing as in DeepSeek-V2."""

from moecule.family import Family

FAMILY = Family(
    "unlimited_ocr", renormalise=False, count_keys=("n_routed_experts",), groups="n_group"
)
