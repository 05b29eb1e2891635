"""Models that are to become one: whether they may, and the config.json of what they become."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from moecule.errors import CheckpointError, RecipeError
from moecule.family import TOP_K_KEYS, text_part
from moecule.folder import set_number
from moecule.hf import Streamed
from moecule.moe import Moe
from moecule.session import tokenizer_of

TOKENIZER = "tokenizer.json"
CHOSEN = "topk_group"  # of config.json: groups of experts that a router picks
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


def counts_of(sources: Sequence[Streamed]) -> list[int]:
    """Experts of a layer, by source."""
    return [first_moe(source).experts.num_experts for source in sources]


def picks_of(sources: Sequence[Streamed]) -> int:
    """Experts that all routers together pick for a token."""
    return sum(first_moe(source).top_k for source in sources)


def first_moe(source: Streamed) -> Moe:
    """The first there is: all of a model's layers have as many experts."""
    return next(moe for i in range(len(source.layers)) if (moe := source.moe(i)))


def check_alike(sources: Sequence[Streamed]) -> None:
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
    if groups > 1 and len(set(counts_of(sources))) > 1:
        raise CheckpointError(
            f"routers of these models pick among {groups} groups, and the models have {counts_of(sources)} "
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


def check_vocabularies(sources: Sequence[Streamed]) -> None:
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


def check_softmax(source: Streamed, what: str, mend: str) -> None:
    """Raise RecipeError where a router's scores are no softmax; `what` is then wrong."""
    scores = source.family.scores_in(source.model.config.get_text_config())
    if scores not in ("softmax", "probability"):
        raise RecipeError(
            f"routers of {source.family.model_type} score by {scores}: {what}; {mend}"
        )


def config_of(sources: Sequence[Streamed], top_k: int | None) -> dict[str, Any]:
    """The result's config.json. `top_k`: experts that are to be picked; None: as many as by all sources.

    Raises CheckpointError where no key of it counts experts, RecipeError for picks that cannot be.
    """
    first, n, times = sources[0], sum(counts_of(sources)), len(sources)
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
    k, own = picks_of(sources) if top_k is None else top_k, first_moe(first).top_k
    if not 1 <= k <= n:
        raise RecipeError(f"top_k = {k}, and there are {n} experts; give 1 to {n}")
    if k > own and not family.is_renormalised(settings):
        check_softmax(
            first, f"{k} picks would add up to more than the {own} it has", f"give --top-k {own}"
        )
    set_number(text, family.count_keys, n)
    set_number(text, TOP_K_KEYS, k)
    if family.groups is not None and family.n_groups(settings) > 1:
        for key, n in (
            (family.groups, family.n_groups(settings)),
            (CHOSEN, family.top_groups(settings)),
        ):
            # some families' files have another name for it
            text[settings.attribute_map.get(key, key)] = times * n
    return config
