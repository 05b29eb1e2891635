"""Fixtures for all tests: tiny checkpoints made once a session, and what tests may skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import checked
import pytest

# before torch imports triton: where there is no GPU its kernels are interpreted
os.environ.setdefault("TRITON_INTERPRET", "0" if shutil.which("nvidia-smi") else "1")
SHARED = Path(__file__).parents[2] / "shared"  # beside the repository, not in it


def pytest_configure(config: pytest.Config) -> None:
    """Imports that take long, but not in the process that only hands out tests to others (`-n 2`)."""
    if config.getoption("numprocesses", None):
        return
    checked.install()
    import tiny  # before any test imports moecule
    from hypothesis import settings

    # the same examples every time, and no clock: machines are slow in turns
    n = tiny.EXAMPLES // 3 if "not slow" in config.option.markexpr else tiny.EXAMPLES
    settings.register_profile(
        "same", derandomize=True, deadline=None, database=None, max_examples=n
    )
    settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def _silent() -> None:
    """One thread, so that sums come in one order; no bars and no advice from transformers."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same draws whichever tests ran before in this process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, _silent: None) -> Callable[..., Path]:
    """checkpoint(name): the folder of that family's tiny model; do not write into it.

    `dtype` is of the files. `tokenizer`: the vocabulary is that of bytes, and its tokenizer is there.
    """
    import tiny
    import torch

    made: dict[tuple[str, torch.dtype, bool], Path] = {}

    def folder(name: str, *, dtype: torch.dtype = torch.float32, tokenizer: bool = False) -> Path:
        key = (name, dtype, tokenizer)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            changes = {"vocab_size": tiny.VOCABULARY} if tokenizer else {}
            tiny.save(name, made[key], dtype, **changes)
            if tokenizer:
                tiny.save_tokenizer(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data beside the repository; a test that needs it is skipped without."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no {SHARED}, whose data this test reads")
    return SHARED


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs a product: where they are interpreted, one takes as long whatever its rows."""
    import torch

    if not torch.cuda.is_available():
        from moecule.kernels import gemv

        monkeypatch.setattr(gemv, "tiling", lambda of, pairs: gemv.Tiling(rows=32))


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the module's `place`; what is written here is not opened afresh, which takes seconds."""
    from moecule import verbs

    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(verbs, "verify", lambda *args: 0.0)
    return tmp_path
