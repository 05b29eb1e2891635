"""A plugin for vLLM: packed checkpoints, each expert of its own width, by our own kernels. Experimental.

vLLM finds it by its entry point (`vllm.general_plugins`) and calls `register` in each of its processes:

    vllm serve out --load-format moecule --enforce-eager

It was written to the interfaces of vLLM 0.33 (`QuantizationConfig`, `FusedMoEMethodBase`,
`BaseModelLoader`) and tested against stand-ins of them. It has never run inside vLLM.

vLLM's own model runs: its attention, its router, its shared experts. Experts are a module of
transformers with our codes in it (runtime.py), which runs `forward.packed_forward` on the tokens and
experts that vLLM's router picked: one launch for all widths on a GPU. All else that is rounded is
unpacked to 16 bits when it is loaded. One GPU; no expert may be missing, merged, in pieces, or of another
width than the config says; online skipping stays off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from moecule.errors import CheckpointError, PlanError
from moecule.exports.contents import Contents
from moecule.forward import packed_forward
from moecule.hf import plain_skeleton
from moecule.learnt import HEADS
from moecule.moe import experts_in, find_layers
from moecule.runtime import MODEL_TYPE, PackedConfig, keep_from, prepare_experts

LAYER = re.compile(r"\.layers\.(\d+)\.")


def register() -> None:
    """What vLLM calls; the classes below were registered when this was imported for it."""


@cache
def contents_of(model: str) -> Contents:
    """The checkpoint, opened once a process. Raises PlanError where only moecule itself can run it."""
    contents = Contents.open(model)
    if contents.stock is not None:
        raise PlanError(f"{model} is a stock checkpoint; serve it without --load-format moecule")
    return contents


def experts_of(contents: Contents, layer: int, dtype: torch.dtype) -> Any:
    """A layer's experts as moecule runs them, in codes, on torch's default device.

    Raises CheckpointError where a tensor of them is missing.
    """
    model = plain_skeleton(contents.checkpoint)
    (name, module), *_ = experts_in(find_layers(model)[1][layer])
    config = PackedConfig(**contents.checkpoint.config["quantization_config"])
    with torch.device("meta"):
        prepare_experts(module, [keep_from(w) for w in config.experts[str(layer)].split()])
    inside = f"{find_layers(model)[0]}.{layer}.{name}."
    names = [
        n
        for n in contents.checkpoint.tensors
        if n.startswith(inside) and not n.startswith(f"{inside}{HEADS}.")  # nothing is skipped
    ]
    device = torch.get_default_device()
    state = {
        n.removeprefix(inside): t.to(device) for n, t in contents.checkpoint.read(names).items()
    }
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as e:
        raise CheckpointError(
            f"{contents.checkpoint.path}: layer {layer} is damaged ({e}); compress again"
        ) from e
    for parameter in module.parameters():  # experts at 16 bits
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return module.eval()


def other_weights(contents: Contents, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All but routed experts, by the names that the family's own checkpoints have; codes are unpacked."""
    for part in contents.parts():
        for name, weight in part.items():
            if ".experts." not in name:
                value = weight.value
                yield name, value if isinstance(value, Tensor) else weight.dense().to(dtype)


@register_quantization_config(MODEL_TYPE)
class MoeculeQuantization(QuantizationConfig):  # type: ignore[misc]
    """Says which layers hold codes."""

    def __init__(self, packed: PackedConfig) -> None:
        super().__init__()
        self.packed = packed
        self.model: str | None = None

    @classmethod
    def get_name(cls) -> str:
        """As in config.json."""
        return MODEL_TYPE

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of the GPU: Triton's kernels take bf16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoeculeQuantization:
        """Of config.json's quantization_config."""
        return cls(PackedConfig(**config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """vLLM says here which model it is. Raises PlanError for one that only moecule can run."""
        contents_of(model_name)
        self.model = model_name

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Ours for routed experts; Linears are as they are, for their codes are unpacked."""
        if isinstance(layer, RoutedExperts):
            found = LAYER.search(prefix)
            if found is None or found[1] not in self.packed.experts or self.model is None:
                raise PlanError(f"{prefix} is no layer of experts that moecule packed; report it")
            return PackedExperts(layer.moe_config, contents_of(self.model), int(found[1]))
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class PackedExperts(FusedMoEMethodBase):  # type: ignore[misc]
    """A layer's experts. They are no parameters of vLLM's layer, whose loaders so leave them alone."""

    def __init__(self, moe: Any, contents: Contents, layer: int) -> None:
        super().__init__(moe)
        self.contents, self.layer = contents, layer
        self.experts: Any = None

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Read them. Raises PlanError where vLLM would share them out, or its config has others."""
        self.experts = experts_of(self.contents, self.layer, params_dtype)
        stack = self.experts.packed[self.experts.slots[0][0]]
        found = (self.experts.num_experts, stack.shapes["down"][0], stack.shapes["down"][1])
        wanted = (num_experts, hidden_size, intermediate_size_per_partition)
        if found != wanted:
            raise PlanError(
                f"layer {self.layer} holds {found[0]} experts of {found[2]} channels, {found[1]} wide, and "
                f"vLLM wants {wanted[0]} of {wanted[2]}, {wanted[1]} wide; serve on one GPU a model that "
                "no expert was dropped from"
            )

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None of vLLM's kernels runs."""

    def apply(
        self,
        layer: nn.Module,
        x: Float[Tensor, "T H"],
        topk_weights: Float[Tensor, "T K"],
        topk_ids: Int[Tensor, "T K"],
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Float[Tensor, "T H"]:
        """Of the experts picked; ids below 0 are nobody's. Shared experts are run by vLLM's runner."""
        ids = topk_ids.long()
        ids = torch.where(ids < 0, self.experts.num_experts, ids)
        made: Tensor = packed_forward(self.experts, x, ids, topk_weights.to(x.dtype))
        return made


@register_model_loader(MODEL_TYPE)
class PackedLoader(BaseModelLoader):  # type: ignore[misc]
    """`--load-format moecule`: names as vLLM's models know them, without the routed experts."""

    def download_model(self, model_config: Any) -> None:
        """The model is a folder here, or in the user's cache."""
        contents_of(model_config.model)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """All but the experts, which are there."""
        model.load_weights(  # type: ignore[operator]
            other_weights(contents_of(model_config.model), model_config.dtype)
        )
