"""What a shell offers when Tab is pressed: models and recipes. Nothing slow is imported."""

from __future__ import annotations

import os
from glob import escape, glob
from pathlib import Path

HERE = Path(__file__).parent
COMPLETE = "_MOECULE_COMPLETE"  # set by the shell's function, for the one process that it starts


def models(incomplete: str) -> list[str]:
    """The embedded model, folders that hold a model, and Hub ids in the cache, as far as typed."""
    folders = [f.removesuffix("/") for f in glob(f"{escape(os.path.expanduser(incomplete))}*/")]
    here = sorted(f for f in folders if Path(f, "config.json").is_file())
    cached = sorted(
        f.name.removeprefix("models--").replace("--", "/")
        for f in _hub_cache().glob("models--*")
        if f.is_dir()
    )
    return [m for m in ("embedded", *here, *cached) if m.startswith(incomplete) or m in here]


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def recipes(incomplete: str) -> list[str]:
    """Recipes of the package, and files."""
    names = sorted(p.stem for p in (HERE / "recipes").glob("*.toml"))
    files = sorted(glob(f"{escape(incomplete)}*.toml"))
    return [n for n in (*names, *files) if n.startswith(incomplete)]
