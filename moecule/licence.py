"""The licence that a model card names, as the Hub reads it: the YAML at the head of README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
KEYS = ("license", "license_name", "license_link")


def licence_of(folder: Path) -> dict[str, Any]:
    """What the card in `folder` says of its licence; nothing where there is no card, or none is named."""
    file = folder / CARD
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    try:
        said = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except (yaml.YAMLError, ValueError):  # of a date, too; the Hub reads none of it either
        return {}
    return {key: said[key] for key in KEYS if said.get(key)} if isinstance(said, dict) else {}


def head_of(said: dict[str, Any]) -> str:
    """The YAML that says so in another card."""
    text = yaml.safe_dump(said, sort_keys=False)
    return f"---\n{text}---\n"
