"""The package: what it is made of, where it imports, and that it installs and runs by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_cpu_path_imports_as_on_windows_and_macos(tmp_path):
    """Without fcntl, resource, fork and Triton; only Triton's kernels and what runs them are not there."""
    script = Path(__file__).with_name("elsewhere.py")
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    kernels = {n for n in found["needs_triton"] if n.startswith("moecule.kernels.")}
    assert {*found["needs_triton"]} - kernels == {"moecule.gpu", "moecule.dense"}
    assert "moecule.kernels.cpu" not in kernels
    assert (found["locks"], found["held"], found["left"]) == (1, [".out.lock"], [])
    assert found["free"] > 0
