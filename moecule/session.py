"""Where a verb runs and what it opens: device, dtype, model, tokenizer, progress."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

from moecule import online
from moecule.budget import format_size
from moecule.checkpoint import Checkpoint
from moecule.decode import QUANTISED
from moecule.errors import CheckpointError, OutputError, RecipeError
from moecule.family import load_family
from moecule.hf import (
    PACKED,
    Streamed,
    auto_class,
    choose_experts,
    open_model,
    quiet,
    skeleton,
)
from moecule.journal import HIDDEN, Journal, Trail
from moecule.names import names_in_memory
from moecule.offload import offload
from moecule.ranks import SOLO, Ranks, join
from moecule.runtime import PackedConfig, prepare_model, set_exact
from moecule.states import Place, choose_place, free_bytes

# (what is done, steps done, of how many, tokens of the text that each passes)
Progress = Callable[[str, int, int, int], None]
ASSETS = Path(__file__).parent / "assets"
DISK_SHARE = 0.8  # of what is free, for hidden states
PROCESSORS = ("processor_config.json", "preprocessor_config.json")  # either marks one
EMBEDDED = "embedded"  # names the small model that comes with the package


def silent(what: str, done: int, of: int, tokens: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Compute:
    """Where and in which precision the model runs; "auto": GPU if there is one, float32 on CPUs."""

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    states: Literal["auto"] | Place = "auto"  # where hidden states lie; auto: as there is room
    ranks: Ranks = SOLO

    def joined(self) -> Compute:
        """As one of the processes that torchrun started, with a GPU of its own; alone, as it is."""
        cuda = self.torch_device().type == "cuda"
        ranks = join(cuda=cuda)
        if cuda and ranks.size > 1:  # by number: what runs in threads begins on the first GPU
            return replace(self, ranks=ranks, device=f"cuda:{torch.cuda.current_device()}")
        return replace(self, ranks=ranks)

    def torch_device(self) -> torch.device:
        """Raises RecipeError for a device that is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as e:
            raise RecipeError(f"device {self.device!r} is not one; wanted cpu or cuda") from e
        if device.type not in ("cpu", "cuda"):
            raise RecipeError(f"device {self.device!r} is not served; wanted cpu or cuda")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RecipeError(
                f"device {self.device} was asked for, and torch finds {torch.cuda.device_count()} "
                "GPUs; use cpu, or another number"
            )
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
    found = Checkpoint.open(resolve(model))
    if found.config["model_type"] == PACKED:
        # what the original was, and what of it is packed: all else is read by these
        of = (found.config.get("moecule", {}).get("model_type"), found.config.get(QUANTISED))
        if not isinstance(of[0], str) or not of[1] or of[1].get("quant_method") != PACKED:
            raise CheckpointError(
                f"{found.path / 'config.json'} does not say what is packed; compress again"
            )
        load_family(of[0])
    return replace(found, name=str(model))


def stream(model: str | Path, compute: Compute, *, empty: bool = False) -> Streamed:
    """A model to walk through, layer by layer. Raises CheckpointError where it is not served."""
    checkpoint = open_checkpoint(model)
    streamed = open_model(
        checkpoint,
        compute.torch_dtype(checkpoint.config),
        compute.torch_device(),
        trust_remote_code=compute.trust_remote_code,
        empty=empty,
    )
    streamed.ranks = compute.ranks
    return streamed


def stream_any(model: str | Path, compute: Compute, *, skip: bool = False) -> Streamed:
    """As `stream`, and a compressed model too, to be run. `skip`: with the online skipping saved in it.

    Raises CheckpointError where it does not load, PlanError for skipping that it does not have.
    """
    checkpoint = open_checkpoint(model)
    if checkpoint.config["model_type"] == PACKED:
        dtype = compute.torch_dtype(checkpoint.config)
        net, family = skeleton(checkpoint, dtype)
        prepare_model(net, PackedConfig(**checkpoint.config[QUANTISED]))
        disk = names_in_memory(net, checkpoint)
        dtypes = {n: checkpoint.tensors[d[0]].dtype for n, d in disk.items()}
        device = compute.torch_device()
        streamed = Streamed(checkpoint, family, net, device, disk, dtypes, compute.ranks)
        streamed.check_whole()
        streamed.load_outer()
    else:
        streamed = stream(model, compute)
    if skip:
        online.set_skip(streamed.model, True)
    return streamed


def state_bytes(streamed: Streamed) -> int:
    """Of what passes from one layer to the next for a token."""
    config = streamed.model.config.get_text_config()
    streams = getattr(config, "hc_mult", None) or getattr(config, "hc_count", None) or 1
    handed = 8 * config.index_topk if streamed.family.takes else 0
    return int(streams * config.hidden_size * streamed.model.dtype.itemsize + handed)


def trail_of(streamed: Streamed, tokens: int, compute: Compute, copies: int, folder: Path) -> Trail:
    """Where a walk over so many tokens keeps its hidden states, `copies` of them at most; no journal.

    Raises OutputError where they must go to disk and there is no room in `folder`.
    """
    size = -(-tokens // compute.ranks.size) * state_bytes(streamed)
    place = compute.states
    if place == "auto":
        place = choose_place(size, copies, streamed.device)
    place = compute.ranks.share(place, 0)
    # what a block hears is some four times as much as its input, for one layer
    near = streamed.device.type == "cpu" or choose_place(size, 4, streamed.device) == "device"
    aside = None if near else torch.device("cpu")
    # what a killed run kept there is written over
    kept = sum(f.stat().st_size for f in (folder / HIDDEN).rglob("*.safetensors"))
    free, want = shutil.disk_usage(folder).free + kept, size * copies * compute.ranks.size
    if want <= DISK_SHARE * free:
        return Trail(place, folder / f"rank_{compute.ranks.rank}", aside=aside)
    if place == "disk":
        raise OutputError(
            f"{folder} has {format_size(free)} left, and hidden states take {format_size(want)}; "
            "make room, or calibrate on fewer or shorter windows (--samples, --length)"
        )
    return Trail(place, aside=aside)


def noting(trail: Trail, journal: Journal, of: str = "") -> Trail:
    """With the journal, where the disk has room for what a killed run goes on from; else a warning.

    `of`: which of the walks that share the journal.
    """
    if trail.folder is None:
        warnings.warn(
            "the disk has no room to keep hidden states: if this run is killed, the pass over the "
            "layers begins again",
            stacklevel=3,
        )
        return trail
    folder = journal.folder / HIDDEN / f"{of}{trail.folder.name}"
    return replace(trail, folder=folder, journal=journal, of=of)


def load(
    model: str | Path,
    compute: Compute,
    *,
    skip: bool = False,
    exact: bool = True,
    cache_bytes: int | None = None,
) -> Any:
    """A whole model, compressed or not, to run. `skip`: with the online skipping saved in it.

    `exact`: as in `runtime.set_exact`. `cache_bytes`: its experts stay on the host, as in
    `offload.offload`.

    Raises CheckpointError where it does not load, PlanError for skipping that it does not have,
    RecipeError for a cache that cannot be.
    """
    checkpoint = open_checkpoint(model)
    if checkpoint.is_coded:
        return _load_decoded(model, compute, skip)
    device = compute.torch_device()
    packed = checkpoint.config["model_type"] == PACKED
    own_code = "auto_map" in checkpoint.config and not packed
    try:
        with quiet():
            trust = compute.trust_remote_code
            settings = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust)
            loaded, told = auto_class(type(settings)).from_pretrained(
                checkpoint.path,
                dtype=compute.torch_dtype(checkpoint.config),
                trust_remote_code=trust,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as e:
        if own_code and not compute.trust_remote_code:
            hint = "; code that comes with a model runs with --trust-remote-code only"
        else:
            hint = "; fetch it again, or make it again if moecule made it"
        said = f"{checkpoint.path} does not load: {_first_line(e)}{hint}"
        raise CheckpointError(said) from e
    check_whole(checkpoint, told)
    if checkpoint.config["model_type"] != PACKED:
        choose_experts(loaded)
    set_exact(loaded, exact)
    if cache_bytes is not None:
        offload(loaded, device, cache_bytes)
    else:
        loaded.to(device)
    if skip:  # what it counts lies where the model is
        online.set_skip(loaded, True)
    return loaded.eval()


def check_whole(checkpoint: Checkpoint, told: Mapping[str, Any]) -> None:
    """Raise CheckpointError where transformers `told` of tensors that it filled in at random."""
    lacking = sorted({*told["missing_keys"], *(k for k, *_ in told["mismatched_keys"])})
    if lacking:
        raise CheckpointError(
            f"{checkpoint.path} lacks {lacking[0]} ({len(lacking)} missing); fetch it again"
        )


def memory_bytes(streamed: Streamed) -> int:
    """Of all parameters and buffers as they are when loaded."""
    model = streamed.model
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def fits(streamed: Streamed) -> bool:
    """Whether the whole model has room on its device now."""
    return 1.2 * memory_bytes(streamed) <= free_bytes(streamed.device)


def _load_decoded(model: str | Path, compute: Compute, skip: bool) -> Any:
    """A whole model of a quantised source, as if it were plain: transformers wants kernels for some."""
    streamed = stream(model, compute)
    for i in range(len(streamed.layers)):
        streamed.load_layer(i)
    loaded = with_settings(streamed)
    if skip:
        online.set_skip(loaded, True)
    return loaded


def with_settings(streamed: Streamed) -> Any:
    """The model, all of it loaded, with its own settings for generating. Raises CheckpointError."""
    if (streamed.checkpoint.path / "generation_config.json").is_file():
        try:
            with quiet():
                found = GenerationConfig.from_pretrained(streamed.checkpoint.path)
        except (OSError, ValueError, TypeError) as e:
            said = f"{streamed.checkpoint.path} has a damaged generation_config.json"
            raise CheckpointError(f"{said} ({_first_line(e)}); fetch it again") from e
        streamed.model.generation_config = found
    return streamed.model


def tokenizer_of(path: Path) -> Any:
    """The tokenizer beside a model. Raises CheckpointError where there is none."""
    try:
        with quiet():
            found = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
        raise CheckpointError(
            f"{path} has no tokenizer that loads ({_first_line(e)}); fetch it again"
        ) from e
    if len(found) < 16:  # without its files transformers makes an empty one
        raise CheckpointError(f"{path} has no tokenizer; fetch its files, such as tokenizer.json")
    return found


def reader_of(path: Path) -> Any:
    """What makes input of a conversation: the processor beside a model, or else its tokenizer.

    Raises CheckpointError where it does not load.
    """
    if not any((path / name).is_file() for name in PROCESSORS):
        return tokenizer_of(path)
    try:
        with quiet():
            return AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
        raise CheckpointError(
            f"{path} has no processor that loads: {_first_line(e)}; fetch it again, or install what "
            "it lacks"
        ) from e


def _first_line(e: Exception) -> str:
    return next(iter(str(e).splitlines()), type(e).__name__)


def ticker(progress: Progress, what: str, steps: int, tokens: int = 0) -> Callable[[], None]:
    """Called once a step, it tells `progress` how far `what` is. `tokens`: that each step passes."""
    done = 0
    progress(what, 0, steps, tokens)

    def tick() -> None:
        nonlocal done
        done += 1
        progress(what, done, steps, tokens)

    return tick
