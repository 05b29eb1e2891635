"""The package: what it is made of, where it imports, and that it installs and runs by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch


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


@pytest.mark.slow
def test_the_sdist_makes_a_wheel_that_runs_by_itself(tmp_path):
    """In a venv of its own: the wheel, what it depends on, and nothing of this folder."""
    root, made = Path(__file__).parents[1], tmp_path / "made"
    call(root, sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", made)
    (sdist,) = made.glob("moecule-*.tar.gz")
    call(tmp_path, sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", made, sdist)
    (wheel,) = made.glob("moecule-*.whl")
    with zipfile.ZipFile(wheel) as held:
        assert any(name.endswith("licenses/LICENSE") for name in held.namelist())
    venv.create(tmp_path / "venv", with_pip=True)
    found = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    same = torch.__version__.partition("+")[0]
    call(
        tmp_path,
        found / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        f"torch=={same}",
        wheel,
    )
    few = ("--bits", "2.5", "--samples", "2", "--length", "32")
    said = call(tmp_path, found / "moecule", "compress", "embedded", "-o", "out", *few)
    assert "routed experts" in said
    assert call(tmp_path, found / "moecule", "generate", "out", "The", "--tokens", "3")


def call(folder: Path, *command: str | Path) -> str:
    """What it prints; it must end well, and sees nothing of PYTHONPATH."""
    env = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    ended = subprocess.run(
        [*map(str, command)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
