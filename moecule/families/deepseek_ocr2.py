"""DeepSeek-OCR 2: routing as in DeepSeek-V2."""

from moecule.family import Family

FAMILY = Family(
    "deepseek_ocr2", renormalise=False, count_keys=("n_routed_experts",), groups="n_group"
)
