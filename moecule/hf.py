"""transformers, as the rest of the project sees it: models that load a layer at a time.

Names on disk become modules through transformers' own conversion mapping, and an experts
module says of itself how its weights lie. So there is no table of names here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as hf_logging

from moecule.batch import Batch
from moecule.checkpoint import Checkpoint
from moecule.decode import QUANTISED
from moecule.errors import CheckpointError
from moecule.family import Family, load_family
from moecule.moe import Moe, experts_in, find_layers, find_moe, try_router
from moecule.names import names_in_memory
from moecule.ranks import SOLO, Ranks
from moecule.record import logits

PACKED = "moecule"  # the model_type of what this package writes
# the whole of a multimodal model before its text part alone
READERS = 4  # threads that copy what is mapped into pinned memory
AUTO = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM)


@dataclass
class Streamed:
    """A causal language model whose decoder layers are on the meta device until asked for."""

    checkpoint: Checkpoint
    family: Family
    model: Any
    device: torch.device
    disk: dict[str, list[str]]  # {name in memory: names on disk that make it}
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # on disk, by name in memory
    ranks: Ranks = SOLO
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _ahead: dict[int, Future[dict[str, Tensor]]] = field(default_factory=dict)  # by layer

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return find_layers(self.model)[1]

    @property
    def prefix(self) -> str:
        """What the names of decoder layers begin with."""
        return f"{find_layers(self.model)[0]}."

    def load(self, names: Sequence[str]) -> None:
        """Read tensors, by their names in memory, into the model.

        Raises CheckpointError where one holds NaN or Inf, or does not fit its place.
        """
        self._put(self._read(names), names)

    def check_whole(self) -> None:
        """Raise CheckpointError where the checkpoint lacks a tensor of the model."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        left = [n for n in self.model.state_dict() if n not in self.disk and n not in tied]
        if left:
            raise CheckpointError(
                f"{self.checkpoint.path} lacks what makes {left[0]} ({len(left)} missing); fetch it again"
            )

    def load_outer(self) -> None:
        """All that lies outside the decoder layers."""
        self.load(self.outer_names())
        self.model.tie_weights()
        _rebuild_buffers(self.model, self.model, self.device)

    def load_layer(self, i: int, then: int | None = None) -> nn.Module:
        """Decoder layer i, with its weights; layer `then` is read while this one is at work."""
        names = self.layer_names(i)
        ahead = self._ahead.pop(i, None)
        self._put(ahead.result() if ahead else self._read(names), names)
        self._ahead.clear()  # what was read ahead for nothing
        if then is not None:
            self._ahead[then] = self._reader.submit(self._read, self.layer_names(then))
        layer: nn.Module = self.layers[i]
        _rebuild_buffers(self.model, layer, self.device)
        return layer

    def load_unrouted(self, i: int) -> nn.Module:
        """Decoder layer i but for its routed experts, which stay on meta."""
        layer: nn.Module = self.layers[i]
        experts = tuple(f"{self.prefix}{i}.{name}." for name, _ in experts_in(layer))
        self.load([n for n in self.layer_names(i) if not n.startswith(experts)])
        _rebuild_buffers(self.model, layer, self.device)
        return layer

    def _on_disk(self, names: Sequence[str]) -> list[str]:
        return sorted({d for n in names for d in self.disk[n]})

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """By their names on disk; for a GPU not decoded yet, for it does that faster."""
        # a mapped file is read when it is touched: touch it here, beside the computation
        if self.device.type == "cuda":
            parts = self.checkpoint.read_parts(self._on_disk(names))
            with ThreadPoolExecutor(READERS) as pool:
                return dict(zip(parts, pool.map(Tensor.pin_memory, parts.values()), strict=True))
        tensors, known = self.checkpoint.read(self._on_disk(names)), self.checkpoint.tensors
        return {n: t if known[n].coded else t.clone() for n, t in tensors.items()}

    def _put(self, tensors: dict[str, Tensor], names: Sequence[str]) -> None:
        if self.device.type == "cuda":
            tensors = self.checkpoint.decoded(self._on_disk(names), tensors, self.device)
        mapping = get_model_conversion_mapping(self.model)
        how = LoadStateDictConfig(
            device_map={"": self.device}, dtype=self.model.dtype, weight_mapping=mapping
        )
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, how)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            wrong = [*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]
            raise CheckpointError(
                f"{self.checkpoint.path} does not fit its config.json: {wrong[0]}; fetch it again"
            )
        missing = [n for n in names if n in info.missing_keys]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.path} lacks what makes {missing[0]}; fetch it again"
            )
        self._check_finite(names)

    def _check_finite(self, names: Sequence[str]) -> None:
        floats = {n: t for n in names if (t := get_tensor(self.model, n)).is_floating_point()}
        # NaN and Inf live on in a sum, which needs no copy of the tensor
        sums = [t.sum(dtype=torch.float64) for t in floats.values()]
        fine = torch.stack(sums).isfinite().tolist() if sums else []
        for made_of in (self.disk[n] for n, ok in zip(floats, fine, strict=True) if not ok):
            read = self.checkpoint.read(made_of)
            bad = [d for d, t in read.items() if not t.double().sum().isfinite()]
            raise CheckpointError(
                f"{bad[0]} holds NaN or Inf; the checkpoint is damaged, fetch it again"
            )

    def layer_names(self, i: int) -> list[str]:
        """Names in memory of the tensors of layer i."""
        inside = f"{self.prefix}{i}."  # once: finding the layers looks at every module
        return [n for n in self.disk if n.startswith(inside)]

    def outer_names(self) -> list[str]:
        """Names in memory of the tensors outside the layers: embeddings, norm, head."""
        inside = self.prefix
        return [n for n in self.disk if not n.startswith(inside)]

    def moe(self, i: int) -> Moe | None:
        """The MoE block of layer i, or None where the layer is dense."""
        return find_moe(self.layers[i], self.family)

    def logits(self, hidden: Float[Tensor, "B S *H"], batch: Batch) -> Float[Tensor, "B S V"]:
        """Of the last layer's output for `batch`, in float32."""
        return logits(self.model, hidden, batch, self.family.takes)

    def to_disk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in memory -> by the family's names on disk, in the disk's dtype."""
        cast = {n: t.to(self.dtypes.get(n, t.dtype)) for n, t in tensors.items()}
        return dict(revert_weight_conversion(self.model, cast))


def open_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    empty: bool = False,
) -> Streamed:
    """The model with embeddings, norm and head loaded, its layers on meta; `empty`: nothing loaded.

    Raises CheckpointError for a family that is not known, a dense model, or missing tensors.
    """
    if checkpoint.config["model_type"] == PACKED:
        raise CheckpointError(
            f"{checkpoint.path} is compressed already; give the original model "
            f"({checkpoint.config['moecule'].get('model', 'unknown')})"
        )
    model, family = skeleton(checkpoint, dtype, trust_remote_code=trust_remote_code)
    disk = names_in_memory(model, checkpoint)
    dtypes = {n: checkpoint.tensors[d[0]].dtype for n, d in disk.items()}
    streamed = Streamed(checkpoint, family, model, device, disk, dtypes)
    streamed.check_whole()
    if not empty:
        streamed.load_outer()
    return streamed


# what transformers raises where a config makes no sense
WRONG = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError,
    RuntimeError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


def skeleton(
    checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> tuple[Any, Family]:
    """(the whole model on meta, its family). Of a compressed checkpoint: as the original was.

    Raises CheckpointError for a family that is not known or a dense model.
    """
    config = checkpoint.config
    packed = config["model_type"] == PACKED
    family = load_family(config["moecule"]["model_type"] if packed else config["model_type"])
    check_version(family)
    try:
        settings = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        _check_layers(settings, checkpoint)
        if QUANTISED not in checkpoint.config:  # decoded as it is read: a plain model
            vars(settings).pop(QUANTISED, None)
        with torch.device("meta"), quiet():
            model = auto_class(type(settings)).from_config(settings, dtype=dtype)
    except CheckpointError:
        raise
    except ImportError as e:  # transformers asks for some packages when a model is built
        said = " ".join(str(e).split())
        raise CheckpointError(f"{family.model_type} cannot be built: {said}; install it") from e
    except WRONG as e:
        raise _no_config(checkpoint, family, e) from e
    model.eval().requires_grad_(False)
    choose_experts(model)
    moes = [m for layer in find_layers(model)[1] if (m := find_moe(layer, family))]
    if any(m.top_k not in range(1, m.experts.num_experts + 1) for m in moes):
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} has {moes[0].experts.num_experts} experts and picks "
            f"{moes[0].top_k} a token; fetch it again"
        )
    width = model.config.get_text_config().hidden_size
    try:
        try_router(moes[0], torch.empty(1, 1, width, dtype=dtype, device="meta"))
    except (IndexError, NameError, RuntimeError) as e:
        raise _no_config(checkpoint, family, e) from e
    return model, family


def plain_skeleton(checkpoint: Checkpoint) -> Any:
    """The model on meta that a compressed checkpoint was made of: names and settings, no weights."""
    left = ("moecule", "auto_map", "expert_skip", QUANTISED)
    config = {k: v for k, v in checkpoint.config.items() if k not in left}
    if checkpoint.config["model_type"] == PACKED:
        config["model_type"] = checkpoint.config["moecule"]["model_type"]
    settings = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"), quiet():
        return auto_class(type(settings)).from_config(settings)


def check_version(family: Family) -> None:
    """Raise CheckpointError where the transformers that is installed is too old for the family."""
    if Version(transformers.__version__) < Version(family.since):
        raise CheckpointError(
            f"{family.model_type} needs transformers {family.since} or newer, and this is "
            f"{transformers.__version__}; update it"
        )


def auto_class(config: type) -> Any:
    """The Auto class that makes the whole model of a class of configs."""
    known = (auto for auto in AUTO if config in auto._model_mapping)
    return next(known, AutoModelForCausalLM)  # code that comes with a model names this one


def auto_name(model_type: str) -> str:
    """Of the Auto class that makes the whole model of a type."""
    name: str = auto_class(CONFIG_MAPPING[model_type]).__name__
    return name


def _no_config(checkpoint: Checkpoint, family: Family, e: Exception) -> CheckpointError:
    said = " ".join(str(e).split())
    return CheckpointError(
        f"{checkpoint.path / 'config.json'} is not a config of {family.model_type}: {said}; fetch it again"
    )


def _check_layers(settings: Any, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for so many layers that making them all would take all memory."""
    n, most = getattr(settings.get_text_config(), "num_hidden_layers", 0), len(checkpoint.tensors)
    if isinstance(n, int) and n > most:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} has {n} layers, and the files hold {most} tensors; "
            "fetch it again"
        )


def choose_experts(model: Any) -> None:
    """Run experts by grouped_mm, or one by one where torch's kernel cannot take their width."""
    experts = [m for _, m in experts_in(model)]
    widths = [
        p.shape[-1] * p.element_size()
        for module in experts
        for n, p in module.named_parameters(recurse=False)
        if n.endswith("_proj")
    ]
    # bytes; torch wants rows to begin at multiples of 16
    set_experts(model, "eager" if any(w % 16 for w in widths) else "grouped_mm")


def set_experts(model: Any, implementation: str) -> None:
    """Have all experts run by one of the functions of transformers' experts interface."""
    for _, module in experts_in(model):  # a model's vision may have none, and refuse to be asked
        module.config._experts_implementation = implementation


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its full name."""
    module, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), leaf)
    return found


def _rebuild_buffers(model: Any, part: nn.Module, device: torch.device) -> None:
    """Compute anew the buffers of `part` that no checkpoint holds, such as rotary frequencies."""
    for module in part.modules():
        buffers = {n: module._buffers[n] for n in module._non_persistent_buffers_set}
        meta = {n: b for n, b in buffers.items() if b is not None and b.is_meta}
        for name, buffer in meta.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if meta:
            model._init_weights(module)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers draws a bar for every layer loaded and warns of choices that are ours."""
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
