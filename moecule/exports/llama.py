"""What llama.cpp makes of a file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from moecule.exports.process import logits_of

CHILD = Path(__file__).with_name("llama_child.py")


def is_there() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def run_file(file: Path, ids: list[int]) -> Float[Tensor, "S V"]:
    """What llama.cpp says after each token. Raises VerifyError where it does not load the file."""
    return logits_of([sys.executable, str(CHILD), str(file)], ids, "llama.cpp")
