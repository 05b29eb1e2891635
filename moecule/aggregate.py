"""One larger model of several: all their experts, all their routers' rows, one of the rest.

Aggregation of experts (AoE), Z-code M3: Kim et al., "Scalable and Efficient MoE Training for Multitask
Multilingual Models", 2021, arXiv:2109.10465: training of a larger MoE starts from trained smaller ones.

    experts, router rows, and all that a router has one of for each expert: one source's after another's
    all else: the mean over sources ("average"), or the first source's ("first")
    picks: the sum of the sources' picks, or `top_k`; groups of experts: the sum, and of those chosen
    center: W_e - mean of W over the source's experts, so a source's mean logit is 0 for every token

With as many picks as all sources together, n copies of one model compute what it computes: each copy
of an expert gets 1/n of its coefficient. (In exact arithmetic; sums of float32 come in another order.)
Centering changes nothing within a source whose scores are a softmax.

Differences from the paper:
- Its text was not at hand: it has the name and the purpose of this, and how dense weights become one,
  how many experts are then picked, and centering are our reading.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moecule.errors import CheckpointError, RecipeError
from moecule.family import TOP_K_KEYS, text_part
from moecule.files import write_text, writing
from moecule.folder import set_number, side_files
from moecule.hf import Streamed, open_model, skeleton
from moecule.journal import journal_of, placed
from moecule.moe import Moe, by_expert, find_layers, find_moe, until
from moecule.session import Compute, Progress, open_checkpoint, silent, stream, ticker, tokenizer_of
from moecule.writer import Writer, check_out, move_into

Dense = Literal["average", "first"]
CPU = Compute(device="cpu", dtype="float32")
TOKENIZER = "tokenizer.json"
# of config.json: says nothing of what a model computes, or is made anew
APART = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *(
        "moecule",
        "use_cache",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
    ),
    *TOP_K_KEYS,
)


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

    Raises RecipeError for fewer than two models and picks that cannot be, CheckpointError for models
    that are not alike, OutputError where `out` holds anything.
    """
    out = Path(out)
    if len(models) < 2:
        raise RecipeError(f"{len(models)} model was given, wanted two or more; give A B ...")
    check_out(out, placed(out))
    sources = [stream(model, CPU, empty=True) for model in models]
    _check_alike(sources)
    _check_vocabularies(sources)
    config = _config(sources, top_k)
    if center:
        _check_softmax(sources[0], "centering changes what a source picks", "leave out --center")
    request = {
        "verb": "aggregate",
        "sources": [s.checkpoint.digest for s in sources],
        "dense": dense,
        "top_k": top_k,
        "center": center,
    }
    with journal_of(out, request) as journal:
        made = journal.folder / "made"
        if not journal.is_written:
            check_out(out, set())
            with writing(made):
                made.mkdir(exist_ok=True)
            write_text(made / "config.json", json.dumps(config, indent=2) + "\n")
            _write(sources, made, config, _Way(dense, center), progress)
            journal.written(p.name for p in made.iterdir())
        move_into(made, out)
        journal.remove()
    return Aggregated(out, sum(_counts(sources)), _picks(sources) if top_k is None else top_k)


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
    places = target.state_dict()
    writer = Writer(made)
    tick = ticker(progress, "aggregate", len(first.layers) + 1)
    for source in sources:
        source.load_outer()
    names = set(first.outer_names())
    held = [{n: t for n, t in s.model.state_dict().items() if n in names} for s in sources]
    writer.add("outer", first.to_disk({n: way.one([of[n] for of in held]) for n in held[0]}))
    tick()
    for i in range(len(first.layers)):
        state = _layer(sources, i, way)
        wrong = [n for n, t in state.items() if t.shape != places[n].shape]
        if wrong:
            raise CheckpointError(
                f"{first.checkpoint.path}: {wrong[0]} would be {tuple(state[wrong[0]].shape)}, and the "
                f"family's config makes it {tuple(places[wrong[0]].shape)}; these cannot be aggregated"
            )
        writer.add(f"layer-{i:04d}", first.to_disk(state))
        for source in sources:
            source.layers[i].to("meta")
        tick()
    writer.close()
    for file in side_files(first.checkpoint.path):
        with writing(made / file.name):
            shutil.copyfile(file, made / file.name)
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
    out = {}
    for name in states[0]:
        tensors = [state[name] for state in states]
        if name not in axes:
            out[prefix + name] = way.one(tensors)
            continue
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


def _scoring(moe: Moe) -> set[str]:
    """Of these, by name: what makes the router's logits. A bias for the choice alone does not."""
    names = {id(module): name for name, module in moe.layer.named_modules()}
    by = by_expert(moe, moe.experts.num_experts)
    return {f"{names[id(m)]}.{leaf}" for m, leaf, _ in by if leaf in ("weight", "bias")}


def _counts(sources: Sequence[Streamed]) -> list[int]:
    """Experts of a layer, by source."""
    return [_moe(source).experts.num_experts for source in sources]


def _picks(sources: Sequence[Streamed]) -> int:
    """Experts that all routers together pick for a token."""
    return sum(_moe(source).top_k for source in sources)


def _moe(source: Streamed) -> Moe:
    """The first there is: all of a model's layers have as many experts."""
    return next(moe for i in range(len(source.layers)) if (moe := source.moe(i)))


def _check_alike(sources: Sequence[Streamed]) -> None:
    """Raise CheckpointError for models that differ in more than their number of experts."""
    first, *others = sources
    apart = {*APART, *first.family.count_keys}
    mine = _plain(first.checkpoint.config, apart)
    for other in others:
        where = f"{first.checkpoint.name} and {other.checkpoint.name}"
        theirs = _plain(other.checkpoint.config, apart)
        for key in sorted(
            {*mine, *theirs}, key=lambda k: (k != "model_type", k != "vocab_size", k)
        ):
            if mine.get(key) != theirs.get(key):
                raise CheckpointError(
                    f"{where} are not alike: {key} is {mine.get(key)!r} and {theirs.get(key)!r}; give "
                    "models of one family, shape and vocabulary"
                )
        if set(first.disk) != set(other.disk):
            name = min(set(first.disk) ^ set(other.disk))
            raise CheckpointError(
                f"{where} are not alike: one has no {name}; give models of one shape"
            )
    groups = first.family.n_groups(first.model.config.get_text_config())
    if groups > 1 and len(set(_counts(sources))) > 1:
        raise CheckpointError(
            f"routers of these models pick among {groups} groups, and the models have {_counts(sources)} "
            "experts a layer; give models with as many experts each"
        )


def _plain(config: Mapping[str, Any], apart: set[str]) -> dict[str, Any]:
    """A config.json without what may differ, in one table."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in apart:
            out |= {f"{key}.{k}": v for k, v in _plain(value, apart).items()}
        elif key not in apart:
            out[key] = value
    return out


def _check_vocabularies(sources: Sequence[Streamed]) -> None:
    """Raise CheckpointError for tokenizers that give one token two meanings."""
    paths = [source.checkpoint.path for source in sources]
    there = [p for p in paths if (p / TOKENIZER).is_file()]
    if len({(p / TOKENIZER).read_bytes() for p in there}) < 2:
        return
    known = [tokenizer_of(p).get_vocab() for p in there]
    for path, vocabulary in zip(there, known, strict=True):
        if vocabulary != known[0]:
            raise CheckpointError(
                f"{there[0]} and {path} have tokenizers of other vocabularies; give models of one tokenizer"
            )


def _check_softmax(source: Streamed, what: str, mend: str) -> None:
    scores = source.family.scores_in(source.model.config.get_text_config())
    if scores not in ("softmax", "probability"):
        raise RecipeError(
            f"routers of {source.family.model_type} score by {scores}: {what}; {mend}"
        )


def _config(sources: Sequence[Streamed], top_k: int | None) -> dict[str, Any]:
    """The result's config.json. Raises CheckpointError where no key of it counts experts."""
    first, n, times = sources[0], sum(_counts(sources)), len(sources)
    family, settings = first.family, first.model.config.get_text_config()
    config: dict[str, Any] = copy.deepcopy(dict(first.checkpoint.config))
    text = text_part(config)
    for keys, what in ((family.count_keys, "experts"), (TOP_K_KEYS, "picks")):
        if not set(keys) & set(text):
            raise CheckpointError(
                f"{first.checkpoint.path / 'config.json'} has no key that counts {what} ({', '.join(keys)}"
                "); save the model anew with transformers"
            )
    for key in ("moecule", "auto_map"):
        config.pop(key, None)
    k, own = _picks(sources) if top_k is None else top_k, _moe(first).top_k
    if not 1 <= k <= n:
        raise RecipeError(f"top_k = {k}, and there are {n} experts; give 1 to {n}")
    if k > own and not family.is_renormalised(settings):
        _check_softmax(
            first, f"{k} picks would add up to more than the {own} it has", f"give --top-k {own}"
        )
    set_number(text, family.count_keys, n)
    set_number(text, TOP_K_KEYS, k)
    if family.groups is not None and family.n_groups(settings) > 1:
        text[family.groups] = times * family.n_groups(settings)
        text["topk_group"] = times * family.top_groups(settings)
    config["moecule"] = {
        "aggregated": [{"model": s.checkpoint.name, "digest": s.checkpoint.digest} for s in sources]
    }
    return config


def _target(first: Streamed, made: Path, config: Mapping[str, Any]) -> Any:
    """The result on meta. Raises RecipeError where its routers do not pick as many as they should."""
    shown = replace(first.checkpoint, path=made, config=config)
    model, family = skeleton(shown, torch.float32)
    moe = next(moe for layer in find_layers(model)[1] if (moe := find_moe(layer, family)))
    hidden = torch.empty(1, 1, model.config.get_text_config().hidden_size, device="meta")
    given: tuple[Any, ...] | None = None
    with suppress(NotImplementedError, TypeError):  # it cannot be tried so
        given = until(
            moe.experts.register_forward_pre_hook, lambda: moe.block(hidden), with_kwargs=True
        )
    if given is not None:
        picked = [*given[1], *given[2].values()][1].shape[-1]
        if picked != moe.top_k:
            raise RecipeError(
                f"routers of {family.model_type} pick {picked} whatever the config says, and {moe.top_k} "
                f"were to be; give --top-k {picked}"
            )
    return model
