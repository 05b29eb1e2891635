"""Where a verb runs and what it opens: device, dtype, model, tokenizer, progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moecule import online
from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError, RecipeError
from moecule.hf import PACKED, Streamed, open_model, quiet

Progress = Callable[[str, int, int], None]  # (what is done, steps done, of how many)
ASSETS = Path(__file__).parent / "assets"
EMBEDDED = "embedded"  # names the small model that comes with the package


def silent(what: str, done: int, of: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Compute:
    """Where and in which precision the model runs; "auto": GPU if there is one, float32 on CPUs."""

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def torch_device(self) -> torch.device:
        """Raises RecipeError for a device that is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as e:
            raise RecipeError(f"device {self.device!r} is not one; wanted cpu or cuda") from e
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RecipeError("device cuda was asked for, and torch finds no GPU; use cpu")
        return device

    def torch_dtype(self, config: Mapping[str, Any]) -> torch.dtype:
        """Raises RecipeError for an unknown one."""
        names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        name = self.dtype
        if name == "auto":
            name = "float32" if self.torch_device().type == "cpu" else stored
        if name not in names:
            raise RecipeError(f"dtype {name!r} is not served; wanted {', '.join(names)} or auto")
        return names[name]


def resolve(model: str | Path) -> str:
    """The folder of the embedded model for "embedded"; anything else as it is."""
    return str(ASSETS / "model") if str(model) == EMBEDDED else str(model)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """A folder, a Hub id in the cache, or the embedded model. Raises CheckpointError."""
    return replace(Checkpoint.open(resolve(model)), name=str(model))


def stream(model: str | Path, compute: Compute, *, empty: bool = False) -> Streamed:
    """A model to walk through, layer by layer. Raises CheckpointError where it is not served."""
    checkpoint = open_checkpoint(model)
    return open_model(
        checkpoint,
        compute.torch_dtype(checkpoint.config),
        compute.torch_device(),
        trust_remote_code=compute.trust_remote_code,
        empty=empty,
    )


def load(model: str | Path, compute: Compute, *, skip: bool = False) -> Any:
    """A whole model, compressed or not, to run. `skip`: with the online skipping saved in it.

    Raises CheckpointError where it does not load, PlanError for skipping that it does not have.
    """
    checkpoint = open_checkpoint(model)
    device = compute.torch_device()
    # eager experts run in any dtype; a compressed model brings its own
    experts = (
        {} if checkpoint.config["model_type"] == PACKED else {"experts_implementation": "eager"}
    )
    try:
        with quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                dtype=compute.torch_dtype(checkpoint.config),
                trust_remote_code=compute.trust_remote_code,
                **experts,
            )
    except (OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{checkpoint.path} does not load: {str(e).splitlines()[0]}") from e
    if skip:
        online.set_skip(loaded, True)
    return loaded.to(device).eval()


def tokenizer_of(path: Path) -> Any:
    """The tokenizer beside a model. Raises CheckpointError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{path} has no tokenizer that loads ({str(e).splitlines()[0]})"
        ) from e


def ticker(progress: Progress, what: str, steps: int) -> Callable[[], None]:
    """Called once a step, it tells `progress` how far `what` is."""
    done = 0
    progress(what, 0, steps)

    def tick() -> None:
        nonlocal done
        done += 1
        progress(what, done, steps)

    return tick
