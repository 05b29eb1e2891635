"""A compressed folder, or a stock one, as other engines know it: every tensor by its family's name on disk.

Names are found as transformers writes them: what stands for the rows of a packed tensor goes
through its own conversion, and says which rows of which expert each name on disk is made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from moecule.checkpoint import Checkpoint
from moecule.decode import QUANTISED
from moecule.errors import PlanError
from moecule.family import Family, load_family
from moecule.hf import PACKED, Streamed, plain_skeleton
from moecule.learnt import HEADS
from moecule.moe import experts_in, find_layers, first_matrix
from moecule.packed import Packed
from moecule.plan import Keep
from moecule.runtime import PackedConfig, keep_from, kind_of
from moecule.session import Compute, open_checkpoint, stream

EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<matrix>.+)\.weight")
_PACKED_EXPERTS = re.compile(
    r"(?P<experts>.+)\.packed\.(?P<kind>[^.]+)\.(?P<matrix>gate_up|down)_(?P<part>\w+)"
)
Parts = dict[str, Tensor]  # codes, scale, zero; or weight
_PACKED_WEIGHT = re.compile(r"(?P<module>.+)\.weight_(?P<part>codes|scale|zero)")


@dataclass(frozen=True)
class Weight:
    """A tensor, in codes or as it is."""

    value: Tensor | Packed

    @property
    def bits(self) -> int:
        """16 for one that is not in codes."""
        return self.value.bits if isinstance(self.value, Packed) else 16

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is when unpacked."""
        if isinstance(self.value, Packed):
            return (*self.value.codes.shape[:-1], self.value.columns)
        return tuple(self.value.shape)

    def dense(self) -> Float[Tensor, "*shape"]:
        """In float32."""
        return self.value.dequantize() if isinstance(self.value, Packed) else self.value.float()

    def rows(self, at: Int[Tensor, " m"]) -> Weight:
        """Some rows, in that order."""
        if isinstance(self.value, Tensor):
            return Weight(self.value[at])
        packed = self.value
        zero = None if packed.zero is None else packed.zero[at]
        return Weight(replace(packed, codes=packed.codes[at], scale=packed.scale[at], zero=zero))


@dataclass(frozen=True)
class Contents:
    """What is to be exported, a decoder layer at a time."""

    checkpoint: Checkpoint
    family: Family
    model: Any  # the family's own, on meta
    stock: Streamed | None  # where nothing is packed

    @staticmethod
    def open(model: str | Path) -> Contents:
        """Raises CheckpointError where it does not open, PlanError for what only moecule can run."""
        checkpoint = open_checkpoint(model)
        if checkpoint.config["model_type"] != PACKED:
            stock = stream(model, Compute("cpu"), empty=True)
            return Contents(checkpoint, stock.family, stock.model, stock)
        family = load_family(checkpoint.config["moecule"]["model_type"])
        _check(checkpoint)
        plain = plain_skeleton(checkpoint)
        for _, experts in experts_in(plain):
            if experts.is_transposed or experts.has_bias:
                raise PlanError(
                    f"{family.model_type} keeps a layer's experts in one tensor, or gives them biases, "
                    "which is not exported once rounded; use moecule itself"
                )
        return Contents(checkpoint, family, plain, None)

    @property
    def settings(self) -> Any:
        """The config of the text model, as transformers knows it."""
        return self.model.config.get_text_config()

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(find_layers(self.model)[1])

    @property
    def skips(self) -> bool:
        """Whether experts are skipped online where moecule runs it."""
        return bool(self.checkpoint.config.get(QUANTISED, {}).get("skip"))

    def parts(self) -> Iterator[dict[str, Weight]]:
        """All tensors by name on disk: what lies outside of the layers, then each layer's."""
        for i in range(-1, self.n_layers):
            yield self.part(i)

    def part(self, i: int) -> dict[str, Weight]:
        """Of layer i; -1: what lies outside of the layers."""
        if self.stock is not None:
            return self._stock_part(self.stock, i)
        return self._packed_part(i)

    def _stock_part(self, stock: Streamed, i: int) -> dict[str, Weight]:
        names = stock.outer_names() if i < 0 else stock.layer_names(i)
        stock.load(names)
        state = stock.model.state_dict()
        found = {n: Weight(t) for n, t in stock.to_disk({n: state[n] for n in names}).items()}
        if i >= 0:
            stock.layers[i].to("meta")
        return found

    def _packed_part(self, i: int) -> dict[str, Weight]:
        prefix = f"{find_layers(self.model)[0]}."
        inside = f"{prefix}{i}."
        of = [
            n
            for n in self.checkpoint.tensors
            if (n.startswith(inside) if i >= 0 else not n.startswith(prefix))
            and f".experts.{HEADS}." not in n  # no other engine skips
        ]
        plain, modules, stacks = _gathered(self.checkpoint.read(of))
        config = PackedConfig(**self.checkpoint.config[QUANTISED])
        coded: dict[str, list[Weight]] = {}
        for module, parts in modules.items():
            columns = self.model.get_submodule(module).weight.shape[1]
            keep = keep_from(config.weights[module])
            coded[f"{module}.weight"] = [_weight(parts, keep, columns)]
        for (module, matrix), by_kind in stacks.items():
            keeps = [keep_from(w) for w in config.experts[str(i)].split()]
            experts = self.model.get_submodule(module)
            first = first_matrix(experts)
            width = keeps[0].channels or experts.down_proj.shape[2]
            columns = width if matrix == "down" else getattr(experts, first).shape[2]
            kinds = [kind_of(keep) for keep in keeps]
            coded[f"{module}.{first if matrix == 'gate_up' else 'down_proj'}"] = [
                _weight(
                    {p: t[kinds[:e].count(kind)] for p, t in by_kind[kind].items()}, keep, columns
                )
                for e, (kind, keep) in enumerate(zip(kinds, keeps, strict=True))
            ]
        return self._named(plain, coded)

    def _named(
        self, plain: Mapping[str, Tensor], coded: Mapping[str, list[Weight]]
    ) -> dict[str, Weight]:
        """By name on disk. `coded`: by name in memory, one for each expert, or one."""
        reverted = revert_weight_conversion(self.model, dict(plain))
        out = {name: Weight(t) for name, t in reverted.items()}
        for name, weights in coded.items():
            rows = weights[0].shape[0]
            marks = torch.arange(len(weights) * rows).view(len(weights), rows, 1)
            if name.endswith(".weight"):  # of one module
                marks = marks[0]
            for made, mark in revert_weight_conversion(self.model, {name: marks}).items():
                at = mark.flatten()
                out[made] = weights[int(at[0]) // rows].rows(at % rows)
        return out


def _check(checkpoint: Checkpoint) -> None:
    """Raise PlanError for what no other engine knows."""
    config = PackedConfig(**checkpoint.config[QUANTISED])
    keeps = {int(i): [keep_from(w) for w in of.split()] for i, of in config.experts.items()}
    every = [keep for of in keeps.values() for keep in of]
    if config.aliased:
        said = "routers have rows of experts that are no more; compress with merge.router=rows"
    elif any(keep.pieces for keep in every):
        said = "experts are in pieces of several widths; compress with another recipe than camera_q"
    elif len({keep.channels for keep in every}) > 1:
        said = "experts have many widths; compress with --set channels.budget=expert"
    elif len({len(of) for of in keeps.values()}) > 1:
        said = "layers have different numbers of experts; compress with score.budget=layer"
    else:
        return
    raise PlanError(f"{checkpoint.path} runs with moecule alone: {said}")


def _gathered(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Parts], dict[tuple[str, str], dict[str, Parts]]]:
    """(what is not packed, {module: parts}, {(experts, matrix): {kind: parts}})."""
    plain, modules = dict[str, Tensor](), dict[str, Parts]()
    stacks = dict[tuple[str, str], dict[str, Parts]]()
    for name, tensor in tensors.items():
        if found := _PACKED_EXPERTS.fullmatch(name):
            kinds = stacks.setdefault((found["experts"], found["matrix"]), {})
            kinds.setdefault(found["kind"], {})[found["part"]] = tensor
        elif found := _PACKED_WEIGHT.fullmatch(name):
            modules.setdefault(found["module"], {})[found["part"]] = tensor
        else:
            plain[name] = tensor
    return plain, modules, stacks


def _weight(parts: Parts, keep: Keep, columns: int) -> Weight:
    if keep.bits == 16:
        return Weight(parts["weight"])
    scale, zero = (parts[p].view(torch.float16) if p in parts else None for p in ("scale", "zero"))
    assert scale is not None  # only one-bit codes lack a zero point
    return Weight(Packed(parts["codes"], scale, zero, keep.bits, keep.group, columns))
