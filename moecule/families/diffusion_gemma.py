"""DiffusionGemma."""

from moecule.family import Family

FAMILY = Family(
    "diffusion_gemma",
    router="router",
    scores="probability",
    renormalise=False,
    count_keys=("num_experts",),
)
