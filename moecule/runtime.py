"""Compressed layers as modules, and loading them through from_pretrained.

A compressed checkpoint has a model_type of its own, so that transformers without this package
stops instead of filling in random experts. Its tensors are named as the modules in memory are,
so no conversion stands between. The family's own forward runs; only weights change places:

- an experts module keeps its class, and runs `forward.packed_forward` through transformers'
  experts interface on the codes in its child `packed`;
- a Linear multiplies by its codes; the weight of any other module becomes a property that unpacks
  when the module's forward asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moecule import forward, online
from moecule.experts import Expert, Experts
from moecule.family import load_family
from moecule.hf import auto_class, set_experts
from moecule.kernels import cpu
from moecule.moe import find_layers, find_moe, first_matrix, select_experts
from moecule.packed import Packed, packed_of, words_per_row
from moecule.pieces import bias_of_pieces
from moecule.plan import Keep
from moecule.ragged import Ragged
from moecule.runs import ids_of, in_runs, run_of

MODEL_TYPE = "moecule"
FORMAT = 1


class Stack(nn.Module):
    """Experts of one width, in codes or, at 16 bits, as they are."""

    def __init__(
        self, n: int, shapes: Mapping[str, tuple[int, int]], keep: Keep, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.keep, self.shapes, self.dtype = keep, dict(shapes), dtype
        for name, (rows, columns) in shapes.items():
            if keep.bits == 16:
                weight = nn.Parameter(
                    torch.empty(n, rows, columns, dtype=dtype), requires_grad=False
                )
                self.register_parameter(f"{name}_weight", weight)
            else:
                register_packed(self, name, (n,), rows, columns, keep)

    def times(
        self, x: Float[Tensor, "T N"], name: str, row: int, *, exact: bool
    ) -> Float[Tensor, "T M"]:
        """x times one expert's matrix."""
        if self.keep.bits == 16:
            return nn.functional.linear(x, self.weight(name, row))
        return forward.times(x, packed_of(self, name, row), exact=exact)

    def weight(self, name: str, row: int) -> Float[Tensor, "M N"]:
        """One expert's matrix, unpacked."""
        if self.keep.bits == 16:
            return self.get_parameter(f"{name}_weight")[row]
        return forward.unpacked(packed_of(self, name, row), self.dtype)

    def job(self, name: str, row: int) -> cpu.Job:
        """One expert's matrix as the kernel knows it."""
        return cpu.Job.of(packed_of(self, name, row))

    def set(self, name: str, row: int, value: Packed | Tensor) -> None:
        """Store one expert's matrix."""
        if isinstance(value, Tensor):
            self.get_parameter(f"{name}_weight").data[row] = value
            return
        for part, tensor in parts_of(value).items():
            self.get_buffer(f"{name}_{part}")[row] = tensor


def register_packed(
    module: nn.Module, name: str, lead: tuple[int, ...], rows: int, columns: int, keep: Keep
) -> None:
    """Empty buffers for a packed weight: <name>_codes, <name>_scale, <name>_zero.

    Scales and zero points are fp16 seen as int16, so that no cast of a model's dtype touches them.
    """
    widths = vars(module).setdefault("widths", {})
    widths[name] = (keep, columns)
    groups = -(-columns // keep.group)
    shape = (*lead, rows, words_per_row(keep.bits, columns))
    module.register_buffer(f"{name}_codes", torch.empty(shape, dtype=torch.int32))
    for part in ("scale",) if keep.bits == 1 else ("scale", "zero"):
        module.register_buffer(
            f"{name}_{part}", torch.empty(*lead, rows, groups, dtype=torch.int16)
        )


def parts_of(packed: Packed) -> dict[str, Tensor]:
    """The tensors of a packed weight, by the ends of their names."""
    zero = {} if packed.zero is None else {"zero": packed.zero.view(torch.int16)}
    return {"codes": packed.codes, "scale": packed.scale.view(torch.int16)} | zero


def prepare_experts(module: Any, keeps: Sequence[Keep]) -> None:
    """Turn a transformers experts module into one with room for packed experts, in place."""
    first = first_matrix(module)
    up, down = getattr(module, first), module.down_proj
    if module.is_transposed:
        up, down = up.mT, down.mT
    dtype, n, full, cuts = up.dtype, len(keeps), down.shape[2], len(keeps[0].each)
    widths = [full if k.channels is None else k.channels for k in keeps]
    run, whole = run_of(keeps, full), keeps
    if run is not None:  # packed, of many widths
        module.register_buffer("runs", ids_of(keeps, full, run).to(down.device))
        keeps, cuts, widths = in_runs(keeps, full), full // run, [full]
    ragged = len(set(widths)) > 1
    if not ragged:
        left = widths[0]
        shapes = {
            "gate_up": (up.shape[1] * left // full // cuts, up.shape[2]),
            "down": (down.shape[1], left // cuts),
        }
    each = [piece for k in keeps for piece in k.each if piece.bits]
    if module.has_bias:
        for name in (f"{first}_bias", "down_proj_bias"):
            long = cuts * shapes["gate_up"][0] if name.startswith(first) and not ragged else None
            bias = getattr(module, name).data[:n, :long]
            bias = bias_of_pieces(module, bias, cuts, first=name.startswith(first))
            setattr(module, name, nn.Parameter(bias, requires_grad=False))
    delattr(module, first)
    del module.down_proj
    if ragged:
        module.packed = nn.ModuleDict(
            {RAGGED: Ragged(widths, up.shape[1] // full, up.shape[2], dtype)}
        )
        module.slots = [(RAGGED, e) for e in range(n)]
    else:
        kinds = sorted(set(each), key=lambda k: (k.bits, k.group))
        module.packed = nn.ModuleDict(
            {kind_of(k): Stack(sum(k == have for have in each), shapes, k, dtype) for k in kinds}
        )
        module.slots = [(kind_of(k), each[:e].count(k)) for e, k in enumerate(each)]
    module.hears = up.shape[2]  # the width of what comes to it
    # pieces run as experts of their own
    module.num_experts, module.cuts, module.whole = len(each), cuts, len(whole)
    module.skip, module.exact = None, True
    module.uses = None  # of each expert, where `offload` counts them


RAGGED = "bits16"  # experts of many widths stay at 16 bits


def kind_of(keep: Keep) -> str:
    """The name of the stack that holds experts of this width."""
    return "bits16" if keep.bits == 16 else f"bits{keep.bits}g{keep.group}"


def fill_experts(
    module: Any, experts: Experts, packed: Mapping[str, Sequence[Packed | None]]
) -> None:
    """Put codes, or the weights of experts at 16 bits, where `prepare_experts` made room.

    `packed` has those of every piece, of the first expert first; None of those that are not there.
    """
    if "runs" in module._buffers:
        packed = {name: [p for p in of if p is not None] for name, of in packed.items()}
    dense = {"gate_up": experts.gate_up, "down": experts.down}
    for e, (kind, row) in enumerate(module.slots):
        for name, weights in dense.items():
            value = packed[name][e]
            module.packed[kind].set(name, row, weights[e] if value is None else value)


def fill_ragged(module: Any, narrow: Sequence[Expert]) -> None:
    """As `fill_experts`, of experts of many widths; biases begin with those that count."""
    for e, expert in enumerate(narrow):
        module.packed[RAGGED].set("gate_up", e, expert.gate_up)
        module.packed[RAGGED].set("down", e, expert.down)
        if expert.gate_up_bias is not None:
            bias = getattr(module, f"{first_matrix(module)}_bias").data[e]
            bias.zero_()[: len(expert.gate_up_bias)] = expert.gate_up_bias


ALL_EXPERTS_FUNCTIONS.register(MODEL_TYPE, forward.packed_forward)

_packed_classes: dict[type, type] = {}


def prepare_weight(module: nn.Module, keep: Keep) -> None:
    """Give a Linear or a router room for a packed weight, in place; its forward stays as it is."""
    weight = module.get_parameter("weight")
    module.weight_dtype, module.exact = weight.dtype, True  # type: ignore[assignment]
    module.peers = module.span = None  # type: ignore[assignment]
    del module.weight
    register_packed(module, "weight", (), weight.shape[0], weight.shape[1], keep)
    own: dict[str, Any] = {"weight": property(_unpacked)}
    if type(module) is nn.Linear:
        own["forward"] = forward.linear_forward
    _give_class(module, own)


def _give_class(module: nn.Module, own: dict[str, Any]) -> None:
    """A class of its own kind with more in it, one for all modules of a kind."""
    base = type(module)
    if base not in _packed_classes:
        _packed_classes[base] = type(f"Packed{base.__name__}", (base,), own)
    module.__class__ = _packed_classes[base]


def _unpacked(module: Any) -> Float[Tensor, "M N"]:
    return forward.unpacked(packed_of(module, "weight"), module.weight_dtype)


def fill_weight(module: nn.Module, packed: Packed) -> None:
    """Put codes where `prepare_weight` made room."""
    for part, tensor in parts_of(packed).items():
        module.get_buffer(f"weight_{part}").copy_(tensor)


@register_quantization_config(MODEL_TYPE)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What of a checkpoint is packed: widths of each expert by layer, of other weights by name."""

    def __init__(
        self,
        experts: dict[str, str]
        | None = None,  # {layer: "3g64 3g64 16c192 ..."}, those that are left
        weights: dict[str, str] | None = None,  # {module: "4g64"}
        aliased: dict[str, int]
        | None = None,  # {layer: experts of its router, which share weights}
        skip: dict[str, Any] | None = None,  # settings() of skip.py
        format: int = FORMAT,
        **ignored: Any,
    ) -> None:
        if format != FORMAT:
            raise ValueError(
                f"checkpoint format {format}, this moecule reads {FORMAT}; update moecule"
            )
        self.quant_method = MODEL_TYPE
        self.format, self.skip = format, skip
        self.experts, self.weights, self.aliased = experts or {}, weights or {}, aliased or {}


def keep_text(keep: Keep) -> str:
    """The short form in config.json: 3g64, 3+2g64 in pieces, or 3g64c192 where 192 channels stay."""
    wide = "" if keep.channels is None else f"c{keep.channels}"
    return ("16" if keep.bits == 16 else f"{keep.code}g{keep.group}") + wide


def keep_from(text: str) -> Keep:
    """The inverse of `keep_text`."""
    coded, _, channels = text.partition("c")
    bits, _, group = coded.partition("g")
    left, widths = int(channels) if channels else None, tuple(map(int, bits.split("+")))
    if len(widths) > 1:
        return Keep.in_pieces(widths, int(group), left)
    return Keep(widths[0], int(group or 0), left)


def prepare_model(model: Any, config: PackedConfig) -> None:
    """Give a whole model on the meta device room for packed weights, and its skip rule if any."""
    family = load_family(model.config.moecule["model_type"])
    layers = find_layers(model)[1]
    with torch.device("meta"):
        for i, widths in config.experts.items():
            moe = find_moe(layers[int(i)], family)
            assert moe is not None  # the writer named only MoE layers
            keeps = [keep_from(w) for w in widths.split()]
            if i in config.aliased:
                moe.experts.register_buffer(
                    "into", torch.empty(config.aliased[i], dtype=torch.int32)
                )
            elif len(keeps) < moe.experts.num_experts:
                select_experts(moe, range(len(keeps)), moe.experts.num_experts)
            prepare_experts(moe.experts, keeps)
            _give_class(moe.block, {"forward": forward.block_forward(type(moe.block).forward)})
        peers: dict[str, Any] = {}  # of each parent
        for name, width in config.weights.items():
            module, parent = model.get_submodule(name), name.rpartition(".")[0]
            prepare_weight(module, keep_from(width))
            if forward.GPU is not None:
                module.peers = peers.setdefault(parent, forward.GPU.dense.Peers())
    set_experts(model, MODEL_TYPE)
    if config.skip is not None:
        online.attach(model, family, config.skip)


def set_exact(model: nn.Module, exact: bool) -> None:
    """Whether packed weights meet activations as they are, or rounded to int8 where that is faster.

    That is on a CPU with AVX-512 VNNI for a few tokens at a time, and on a GPU but for dense weights and
    many tokens; models are exact when loaded.
    """
    for module in model.modules():
        if "exact" in vars(module):
            module.exact = exact  # type: ignore[assignment]


@register_quantizer(MODEL_TYPE)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps weights for codes before transformers loads them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        prepare_model(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for parameter in model.parameters():  # up to 5.17 weights keep the dtype of the file
            if parameter.is_floating_point() and parameter.dtype != model.dtype:
                parameter.data = parameter.data.to(model.dtype)
        if self.quantization_config.skip is not None and model.config.expert_skip:
            online.set_skip(model, True)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """What transformers asks before it compiles a decoding step."""
        return True


class MoeculeConfig(PreTrainedConfig):  # type: ignore[misc]
    """Stands for model_type "moecule"; becomes a subclass of the original family's config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base = CONFIG_MAPPING[config_dict["moecule"]["model_type"]]
        return _classes(base)[0].from_dict(config_dict, **kwargs)


class MoeculeForCausalLM:
    """What auto_map names: opens a checkpoint with the model class of its family."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """transformers asks this of remote code; there is nothing to do."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Open with the model class of the family that `path` was made from."""
        config = config or AutoConfig.from_pretrained(path)
        made = auto_class(type(config))._model_mapping[type(config)]
        return made.from_pretrained(path, *args, config=config, **kwargs)


_made: dict[type, tuple[Any, Any]] = {}


def _classes(base: Any) -> tuple[Any, Any]:
    """(config class, model class) of a compressed family, registered with the auto classes."""
    if base not in _made:
        auto = auto_class(base)
        model_base = auto._model_mapping[base]
        own = {"model_type": MODEL_TYPE, "expert_skip": False}
        # up to 5.17 transformers mends configs that are not its own, and spoils this one
        own["is_custom_code"] = classmethod(lambda cls: False)
        config = type(base.__name__, (base,), own)
        # transformers reads a class's source file to know these; ours would say no
        answers = {
            "_can_set_experts_implementation": model_base._can_set_experts_implementation,
            "_can_set_attn_implementation": model_base._can_set_attn_implementation,
        }
        model = type(model_base.__name__, (model_base,), {"config_class": config, **answers})
        for made in (config, model):
            made.__module__ = __name__
        for each in {auto, AutoModelForCausalLM}:
            each.register(config, model, exist_ok=True)
        _made[base] = (config, model)
    return _made[base]


AutoConfig.register(MODEL_TYPE, MoeculeConfig, exist_ok=True)
