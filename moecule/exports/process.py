"""Asking another engine in a process of its own, which it may change as it likes."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moecule.errors import VerifyError


def logits_of(command: Sequence[str], ids: list[int], who: str) -> Float[Tensor, "S V"]:
    """What `command TOKENS LOGITS` writes (.npy in, .npy out). Raises VerifyError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "ids.npy", Path(folder) / "logits.npy"
        np.save(given, np.array(ids, dtype=np.int32))
        run = subprocess.run([*command, str(given), str(made)], capture_output=True, text=True)
        if run.returncode != 0:
            line = next(reversed(run.stderr.strip().splitlines()), "no output")
            raise VerifyError(f"{who} does not run what was written: {line}; report it")
        return torch.from_numpy(np.load(made))
