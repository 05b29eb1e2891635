"""transformers, as the rest of the project sees it: models that load a layer at a time.

Names on disk become modules through transformers' own conversion mapping, and an experts
module says of itself how its weights lie. So there is no table of names here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as hf_logging

from moecule.checkpoint import Checkpoint
from moecule.decode import QUANTISED
from moecule.errors import CheckpointError
from moecule.experts import Experts
from moecule.family import Family, load_family

PACKED = "moecule"  # the model_type of what this package writes


@dataclass(frozen=True)
class Moe:
    """The modules of one layer's MoE block."""

    name: str  # of the block inside its layer: "mlp"
    block: nn.Module
    experts: Any  # a transformers experts module
    router: Any


@dataclass
class Streamed:
    """A causal language model whose decoder layers are on the meta device until asked for."""

    checkpoint: Checkpoint
    family: Family
    model: Any
    device: torch.device
    disk: dict[str, list[str]]  # {name in memory: names on disk that make it}
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # on disk, by name in memory

    @property
    def base(self) -> Any:
        """The model without its head."""
        return self.model.base_model

    @property
    def prefix(self) -> str:
        """What the names of decoder layers begin with."""
        return f"{self.model.base_model_prefix}.layers."

    def load(self, names: Sequence[str]) -> None:
        """Read tensors, by their names in memory, into the model.

        Raises CheckpointError where one holds NaN or Inf, or does not fit its place.
        """
        wanted = sorted({d for n in names for d in self.disk[n]})
        tensors = self.checkpoint.read(wanted)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name} holds NaN or Inf; the checkpoint is damaged")
        mapping = get_model_conversion_mapping(self.model)
        how = LoadStateDictConfig(
            device_map={"": self.device}, dtype=self.model.dtype, weight_mapping=mapping
        )
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, how)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            wrong = [*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]
            raise CheckpointError(
                f"{self.checkpoint.path} does not fit its config.json: {wrong[0]}"
            )
        missing = [n for n in names if n in info.missing_keys]
        if missing:
            raise CheckpointError(f"{self.checkpoint.path} lacks what makes {missing[0]}")

    def load_layer(self, i: int) -> nn.Module:
        """Decoder layer i, with its weights."""
        self.load(self.layer_names(i))
        layer: nn.Module = self.base.layers[i]
        return layer

    def layer_names(self, i: int) -> list[str]:
        """Names in memory of the tensors of layer i."""
        return [n for n in self.disk if n.startswith(f"{self.prefix}{i}.")]

    def outer_names(self) -> list[str]:
        """Names in memory of the tensors outside the layers: embeddings, norm, head."""
        return [n for n in self.disk if not n.startswith(self.prefix)]

    def moe(self, i: int) -> Moe | None:
        """The MoE block of layer i, or None where the layer is dense."""
        return find_moe(self.base.layers[i], self.family)

    def logits(self, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S V"]:
        """Of the last layer's output, in float32: the norm and the head."""
        out: Tensor = self.model.get_output_embeddings()(self.base.norm(hidden)).float()
        return out

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
    if empty:
        return streamed
    streamed.load(streamed.outer_names())
    model.tie_weights()
    _rebuild_buffers(model, device)
    left = [n for n, t in model.state_dict().items() if t.is_meta and n not in disk]
    if left:
        raise CheckpointError(f"{checkpoint.path} lacks what makes {left[0]} ({len(left)} missing)")
    return streamed


def skeleton(
    checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> tuple[Any, Family]:
    """(the whole model on meta, its family). Of a compressed checkpoint: as the original was.

    Raises CheckpointError for a family that is not known or a dense model.
    """
    config = checkpoint.config
    packed = config["model_type"] == PACKED
    family = load_family(config["moecule"]["model_type"] if packed else config["model_type"])
    try:
        settings = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        if QUANTISED not in checkpoint.config:  # decoded as it is read: a plain model
            vars(settings).pop(QUANTISED, None)
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(
                settings, dtype=dtype, experts_implementation="grouped_mm"
            )
    except (ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError) as e:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} is not a config of {family.model_type}: "
            f"{' '.join(str(e).split())}; fetch it again"
        ) from e
    model.eval().requires_grad_(False)
    choose_experts(model)
    moes = [m for layer in model.base_model.layers if (m := find_moe(layer, family))]
    if not moes:
        raise CheckpointError(
            f"{checkpoint.path} has no MoE layer; there are no experts to compress"
        )
    if any(m.router.top_k > m.experts.num_experts for m in moes):
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} has {moes[0].experts.num_experts} experts and picks "
            f"{moes[0].router.top_k} a token; fetch it again"
        )
    return model, family


def choose_experts(model: Any) -> None:
    """Run experts by grouped_mm, or one by one where torch's kernel cannot take their width."""
    widths = [
        p.shape[-1] * p.element_size()
        for n, p in model.named_parameters()
        if n.endswith(("gate_up_proj", "down_proj"))
    ]
    if any(w % 16 for w in widths):  # bytes; torch wants rows to begin at multiples of 16
        model.set_experts_implementation("eager")


def names_in_memory(model: Any, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """{name in memory: the names on disk it is made of}; what the model has no place for is left out."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    places = model.state_dict()
    out: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        new, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        if new in places:
            out.setdefault(new, []).append(name)
    return out


def _rebuild_buffers(model: Any, device: torch.device) -> None:
    """Compute anew the buffers that no checkpoint holds, such as rotary frequencies."""
    for module in model.modules():
        meta = [n for n in module._non_persistent_buffers_set if module._buffers[n].is_meta]
        for name in meta:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if meta:
            model._init_weights(module)


def find_moe(layer: nn.Module, family: Family) -> Moe | None:
    """The MoE block in a decoder layer. Raises CheckpointError for experts that are not served."""
    for name, module in layer.named_modules():
        if "is_concatenated" not in vars(module):  # set by transformers on experts modules alone
            continue
        experts: Any = module
        parent, _, _ = name.rpartition(".")
        block = layer.get_submodule(parent)
        # has_post_expert_norm came with transformers 5.2x
        if vars(module).get("has_post_expert_norm") or not experts.has_gate:
            raise CheckpointError(
                f"{type(experts).__name__} is not served: no gate, or a norm inside"
            )
        return Moe(parent, block, experts, block.get_submodule(family.router))
    return None


def experts_of(module: Any) -> Experts:
    """A module's weights as `Experts`: views, not copies."""
    up, down = module.gate_up_proj.data, module.down_proj.data
    if module.is_transposed:
        up, down = up.mT, down.mT
    biases = (module.gate_up_proj_bias.data, module.down_proj_bias.data) if module.has_bias else ()
    return Experts(up, down, module._apply_gate, *biases)


def put_experts(module: Any, experts: Experts) -> None:
    """Overwrite a module's matrices, whose number may have changed. Biases too."""
    up, down = experts.gate_up, experts.down
    if module.is_transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    module.gate_up_proj = nn.Parameter(up, requires_grad=False)
    module.down_proj = nn.Parameter(down, requires_grad=False)
    if experts.gate_up_bias is not None and experts.down_bias is not None:
        module.gate_up_proj_bias = nn.Parameter(experts.gate_up_bias, requires_grad=False)
        module.down_proj_bias = nn.Parameter(experts.down_bias, requires_grad=False)
    module.num_experts = len(experts)


def select_experts(moe: Moe, kept: Sequence[int], n_experts: int) -> None:
    """Cut the router, and its bias, to the experts `kept`, in place."""
    at = list(kept)
    for name, tensor in [*moe.router.named_parameters(), *moe.router.named_buffers()]:
        if tensor.shape[0] == n_experts:
            cut = tensor.data[at].contiguous() if not tensor.is_meta else tensor.data[: len(at)]
            if name in moe.router._buffers:
                moe.router._buffers[name] = cut
            else:
                setattr(moe.router, name, nn.Parameter(cut, requires_grad=False))
    moe.router.num_experts = len(at)


@dataclass
class Heard:
    """What a MoE block's experts and router were given, batch after batch."""

    x: list[Float[Tensor, "T H"]] = field(default_factory=list)
    idx: list[Int[Tensor, "T K"]] = field(default_factory=list)
    coef: list[Float[Tensor, "T K"]] = field(default_factory=list)
    routed: list[Float[Tensor, "T H"]] = field(default_factory=list)
    logits: list[Float[Tensor, "T E"]] = field(default_factory=list)


@contextmanager
def listening(moe: Moe) -> Iterator[Heard]:
    """Within, every pass through the block is noted. The routing is the model's own, never re-derived."""
    heard = Heard()

    def on_experts(
        module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor
    ) -> None:
        x, idx, coef = (*args, *kwargs.values())
        heard.x.append(x)
        heard.idx.append(idx)
        heard.coef.append(coef.float())
        heard.routed.append(out)

    def on_router(module: Any, args: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        heard.logits.append(out[0].float())

    handles = [
        moe.experts.register_forward_hook(on_experts, with_kwargs=True),
        moe.router.register_forward_hook(on_router),
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes how it is called, lets hidden states by."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        object.__setattr__(self, "_layer", layer)

    def __getattr__(self, name: str) -> Any:  # models ask layers for e.g. attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        return hidden


@contextmanager
def recorded(base: Any) -> Iterator[list[_Recorder]]:
    """Within, base(tokens) embeds them and notes each layer's masks, but computes no layer."""
    layers, norm = base.layers, base.norm
    base.layers = nn.ModuleList(_Recorder(layer) for layer in layers)
    base.norm = nn.Identity()
    try:
        yield list(base.layers)
    finally:
        base.layers, base.norm = layers, norm


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
