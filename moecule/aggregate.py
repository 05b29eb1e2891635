"""One larger model of several: all their experts, all their routers' rows, one of the rest.

Aggregation of experts (AoE), Z-code M3: Kim et al., "Scalable and Efficient MoE Training for Multitask
Multilingual Models", 2021, arXiv:2109.10465: training of a larger MoE starts from trained smaller ones.

    experts, router rows, and all that a router has one of for each expert: one source's after another's
    a bias that is for the choice alone, added to a softmax: divided by the number of sources
    all else: the mean over sources ("average"), or the first source's ("first")
    picks: the sum of the sources' picks, or `top_k`; groups of experts: the sum, and of those chosen
    center: W_e - mean of W over the source's experts, so a source's mean logit is 0 for every token

With as many picks as all sources together, n copies of one model compute what it computes: each copy
of an expert gets 1/n of its coefficient. (In exact arithmetic; sums of float32 come in another order.)
Centering changes nothing within a source whose scores are a softmax.

Differences from the paper:
- Its text was not at hand: it has the name and the purpose of this, and how dense weights become one,
  how many experts are then picked, biases and centering are our reading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moecule.errors import CheckpointError, RecipeError
from moecule.files import write_text, writing
from moecule.folder import HEALED, copy_into, side_files
from moecule.hf import Streamed, open_model, skeleton
from moecule.journal import making, sweep
from moecule.moe import Moe, by_expert, find_layers, find_moe, try_router
from moecule.session import Compute, Progress, open_checkpoint, silent, stream, ticker
from moecule.sources import (
    check_alike,
    check_softmax,
    check_vocabularies,
    config_of,
    counts_of,
    picks_of,
)
from moecule.writer import Writer

Dense = Literal["average", "first"]
CPU = Compute(device="cpu", dtype="float32")
NOTED = "aggregated"  # in config.json


@dataclass(frozen=True)
class Aggregated:
    """What was made."""

    folder: Path
    experts: int  # of a layer
    top_k: int  # that a router picks


def aggregate(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    dense: Dense = "average",
    top_k: int | None = None,
    center: bool = False,
    progress: Progress = silent,
) -> Aggregated:
    """A stock checkpoint in `out` with the experts of all models; a layer in memory at a time.

    Does nothing where `out` holds just that.
    Raises RecipeError for fewer than two models and picks that cannot be, CheckpointError for models
    that are not alike, OutputError where `out` holds other things.
    """
    out = Path(out)
    if len(models) < 2:
        raise RecipeError(f"{len(models)} model was given, wanted two or more; give A B ...")
    sources = [stream(model, CPU, empty=True) for model in models]
    check_alike(sources)
    check_vocabularies(sources)
    config = config_of(sources, top_k)
    if center:
        check_softmax(sources[0], "centering changes what a source picks", "leave out --center")
    request = {
        "sources": [{"model": s.checkpoint.name, "digest": s.checkpoint.digest} for s in sources],
        "dense": dense,
        "top_k": top_k,
        "center": center,
    }
    config["moecule"] = {NOTED: request}
    made = Aggregated(out, sum(counts_of(sources)), top_k or picks_of(sources))
    if _noted(out) == request:
        sweep(out, whole=True)
        return made
    with making(out, {"verb": "aggregate", **request}) as journal:
        if not journal.is_written:
            folder = journal.made
            with writing(folder):
                folder.mkdir(exist_ok=True)
            write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
            _write(sources, folder, config, _Way(dense, center), progress)
    return made


def _noted(out: Path) -> Any:
    """What the checkpoint in `out` was aggregated of, if it was and is as it was made."""
    if not (out / "config.json").is_file():
        return None
    noted = open_checkpoint(out).config.get("moecule", {})
    return None if HEALED in noted else noted.get(NOTED)


@dataclass(frozen=True)
class _Way:
    """How tensors of all sources become one."""

    dense: Dense
    center: bool

    def one(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of what all sources have one of."""
        if self.dense == "average" and tensors[0].is_floating_point():
            # in float64, so that the mean of equal numbers is that number
            mean = torch.stack([t.double() for t in tensors]).mean(0)
            return mean.to(tensors[0].dtype)
        return tensors[0]

    def all(self, tensors: Sequence[Tensor], counts: Sequence[int], axis: int) -> Tensor:
        """Of what there is one of for each expert; rows of shared experts come last, and are one."""
        routed = [t.narrow(axis, 0, n) for t, n in zip(tensors, counts, strict=True)]
        more = tensors[0].shape[axis] - counts[0]
        if not more:
            return torch.cat(routed, axis)
        shared = [t.narrow(axis, n, more) for t, n in zip(tensors, counts, strict=True)]
        return torch.cat([*routed, self.one(shared)], axis)


def _write(
    sources: Sequence[Streamed],
    made: Path,
    config: Mapping[str, Any],
    way: _Way,
    progress: Progress,
) -> None:
    """All that is not config.json, into `made`; then the folder is opened, and each tensor looked for."""
    first = sources[0]
    target = _target(first, made, config)
    whole = replace(first, model=target)  # how experts lie on disk may hang on their number
    places = target.state_dict()
    writer = Writer(made)
    tick = ticker(progress, "aggregate", len(first.layers) + 1)
    for source in sources:
        source.load_outer()
    names = set(first.outer_names())
    held = [{n: t for n, t in s.model.state_dict().items() if n in names} for s in sources]
    writer.add("outer", whole.to_disk({n: way.one([of[n] for of in held]) for n in held[0]}))
    tick()
    for i in range(len(first.layers)):
        state = _layer(sources, i, way)
        wrong = [n for n, t in state.items() if t.shape != places[n].shape]
        if wrong:
            raise CheckpointError(
                f"{first.checkpoint.path}: {wrong[0]} would be {tuple(state[wrong[0]].shape)}, and the "
                f"family's config makes it {tuple(places[wrong[0]].shape)}; these cannot be aggregated"
            )
        writer.add(f"layer-{i:04d}", whole.to_disk(state))
        for source in sources:
            source.layers[i].to("meta")
        tick()
    writer.close()
    copy_into(made, side_files(first.checkpoint.path))
    open_model(open_checkpoint(made), torch.float32, torch.device("cpu"), empty=True)


def _layer(sources: Sequence[Streamed], i: int, way: _Way) -> dict[str, Tensor]:
    """One layer of the result, by names in memory."""
    prefix = f"{sources[0].prefix}{i}."
    states = [source.load_layer(i).state_dict() for source in sources]
    moes = [moe for source in sources if (moe := source.moe(i))]
    if not moes:
        return {prefix + n: way.one([state[n] for state in states]) for n in states[0]}
    counts = [moe.experts.num_experts for moe in moes]
    axes = _axes(moes[0])
    text = sources[0].model.config.get_text_config()
    softmax = sources[0].family.scores_in(text) == "softmax"
    out = {}
    for name in states[0]:
        tensors = [state[name] for state in states]
        if name not in axes:
            out[prefix + name] = way.one(tensors)
            continue
        if softmax and name in _choosing(moes[0]):
            # the softmax is over all sources' experts, and gives each so much less
            tensors = [t / len(sources) for t in tensors]
        if way.center and name in _scoring(moes[0]):
            tensors = [_centered(t, n, axes[name]) for t, n in zip(tensors, counts, strict=True)]
        out[prefix + name] = way.all(tensors, counts, axes[name])
    return out


def _centered(tensor: Tensor, n: int, axis: int) -> Tensor:
    """Less the mean over the n experts; rows of shared experts stay."""
    routed = tensor.narrow(axis, 0, n).double()
    less = (routed - routed.mean(axis, keepdim=True)).to(tensor.dtype)
    return torch.cat([less, tensor.narrow(axis, n, tensor.shape[axis] - n)], axis)


def _axes(moe: Moe) -> dict[str, int]:
    """{tensor of the layer, by name: the axis along which experts lie}"""
    names = {id(module): name for name, module in moe.layer.named_modules()}
    inside = names[id(moe.experts)]
    found = {f"{inside}.{leaf}": 0 for leaf, _ in moe.experts.named_parameters(recurse=False)}
    for module, leaf, axis in by_expert(moe, moe.experts.num_experts):
        found[f"{names[id(module)]}.{leaf}".lstrip(".")] = axis
    return found


def _choosing(moe: Moe) -> set[str]:
    """Of these, by name: what is added to scores for the choice alone, and is not in coefficients."""
    names = {id(module): name for name, module in moe.layer.named_modules()}
    by = by_expert(moe, moe.experts.num_experts)
    return {f"{names[id(m)]}.{leaf}".lstrip(".") for m, leaf, _ in by if leaf.endswith("_bias")}


def _scoring(moe: Moe) -> set[str]:
    """Of these, by name: what makes the router's logits. A bias for the choice alone does not."""
    names = {id(module): name for name, module in moe.layer.named_modules()}
    by = by_expert(moe, moe.experts.num_experts)
    return {f"{names[id(m)]}.{leaf}" for m, leaf, _ in by if leaf in ("weight", "bias")}


def _target(first: Streamed, made: Path, config: Mapping[str, Any]) -> Any:
    """The result on meta. Raises RecipeError where its routers do not pick as many as they should."""
    shown = replace(first.checkpoint, path=made, config=config)
    model, family = skeleton(shown, torch.float32)
    moe = next(moe for layer in find_layers(model)[1] if (moe := find_moe(layer, family)))
    hidden = torch.empty(1, 1, model.config.get_text_config().hidden_size, device="meta")
    given = try_router(moe, hidden)
    before = first.family.n_groups(first.model.config.get_text_config())
    groups = before * len(config["moecule"][NOTED]["sources"]) if before > 1 else 1
    found = family.n_groups(model.config.get_text_config())
    if groups != found:
        raise CheckpointError(
            f"{first.checkpoint.path}: routers would pick among {found} groups of experts, and {groups} "
            "were to be; these cannot be aggregated"
        )
    if given is not None:
        picked = [*given[1], *given[2].values()][1].shape[-1]
        if picked != moe.top_k:
            raise RecipeError(
                f"routers of {family.model_type} pick {picked} whatever the config says, and {moe.top_k} "
                f"were to be; give --top-k {picked}"
            )
    return model
