"""What llama.cpp makes of a file, asked in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moecule.errors import VerifyError

CHILD = Path(__file__).with_name("llama_child.py")


def is_there() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def logits_of(file: Path, ids: list[int]) -> Float[Tensor, "S V"]:
    """What llama.cpp says after each token. Raises VerifyError where it does not load the file."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "ids.npy", Path(folder) / "logits.npy"
        np.save(given, np.array(ids, dtype=np.int32))
        command = [sys.executable, str(CHILD), str(file), str(given), str(made)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            line = next(reversed(run.stderr.strip().splitlines()), "no output")
            raise VerifyError(f"llama.cpp does not load {file}: {line}")
        return torch.from_numpy(np.load(made))
