"""All model families: those for which every law holds, those refused, and why.

families.json beside this file is written by tests/conform.py, which runs the laws over every
family; nobody edits it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from moecule.families import REFUSED
from moecule.family import family_names

FOUND = Path(__file__).parent / "families.json"
HEADS = ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "MULTIMODAL_LM", "TOKEN_CLASSIFICATION")
Status = Literal["full", "refused", "not tried"]


@dataclass(frozen=True)
class Listed:
    """One family."""

    name: str  # the model_type of config.json
    status: Status  # full: every law was run over it, and holds
    reason: str = ""


def catalogue() -> list[Listed]:
    """Every family that is served, refused, or known to the transformers that is installed."""
    hold = set(json.loads(FOUND.read_text())["laws"])
    found = {name: Listed(name, "refused", why) for name, why in REFUSED.items()}
    for name in family_names():
        found[name] = Listed(name, "full" if name in hold else "not tried")
    for name in served_by_transformers():
        found.setdefault(name, Listed(name, "not tried", "new in transformers"))
    return [found[name] for name in sorted(found)]


def served_by_transformers() -> dict[str, str]:
    """{model_type: class} of all models whose experts run through the experts interface.

    The parts of a model (`x_text`, `x_vision`) are left out where `x` is a model itself.
    """
    models = Path(transformers.__file__).parent / "models"
    marked = re.compile(r"^@use_experts_implementation", re.MULTILINE)
    modules = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if marked.search(file.read_text(encoding="utf-8"))
    }
    types = {
        name: head
        for name in CONFIG_MAPPING_NAMES
        if model_type_to_module_name(name) in modules and (head := head_of(name))
    }
    whole = {name.removesuffix("_mm_model") for name in types if not name.endswith("_text")}
    parts = {name for name in types if name.endswith("_text")}
    return {
        n: h for n, h in types.items() if n not in parts or n.removesuffix("_text") not in whole
    }


def head_of(model_type: str) -> str | None:
    """The class with a head that transformers gives a type: the whole model before a part of it."""
    for head in HEADS:
        names: dict[str, str] = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
        if model_type in names:
            return names[model_type]
    return None


def readme_table() -> str:
    """The families as README.md lists them."""
    full = [f.name for f in catalogue() if f.status == "full"]
    lines = ["| families | |", "|---|---|", f"| served ({len(full)}) | {', '.join(full)} |"]
    for why in dict.fromkeys(REFUSED.values()):
        names = ", ".join(name for name in REFUSED if REFUSED[name] == why)
        lines.append(f"| refused | {names}: {why} |")
    return "\n".join(lines) + "\n"
