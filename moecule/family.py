"""What a model family does not say of itself: data, one file a family.

transformers knows how a checkpoint's names become modules and its experts describe their own
layout (`hf.py` reads both). Left over is how the router's numbers are meant, and under which
keys config.json counts the experts.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecule.errors import CheckpointError

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "probability")  # the last: given as such
# config keys of which one or more say how many experts the router picks for a token
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
INSIDE = ("thinker_config", "text_config")  # of a multimodal model's config, on the way to the text


@dataclass(frozen=True)
class Family:
    """Facts of one `model_type`."""

    model_type: str  # as in config.json; also the file's name
    router: str = "gate"  # the experts' sibling that returns (logits, coef, index)
    scores: str = "softmax"  # of SCORES, of the logits of all experts; or the config key that says
    # whether the chosen coefficients are scaled to sum to 1: always, never, or as a config key says
    renormalise: bool | str = True
    count_keys: tuple[str, ...] = ("num_local_experts",)  # in config.json; those present count
    groups: str | None = None  # config key: the router picks groups of experts first
    # the argument in which a layer receives what the one before returned after the hidden states
    takes: str | None = None
    since: str = "5.16"  # the first transformers whose experts and router are as said here

    def is_renormalised(self, config: Any) -> bool:
        """Whether a token's coefficients sum to a constant; `config` is of the model's text part."""
        if isinstance(self.renormalise, bool):
            return self.renormalise
        return bool(getattr(config, self.renormalise, False))

    def scores_in(self, config: Any) -> str:
        """Of SCORES, what this model makes of its router's logits.

        Raises CheckpointError where the config names something else.
        """
        found = self.scores if self.scores in SCORES else getattr(config, self.scores, None)
        if found not in SCORES:
            raise CheckpointError(
                f"config.json: {self.scores} is {found!r}, wanted one of {SCORES}"
            )
        return str(found)

    def n_groups(self, config: Any) -> int:
        """Groups of experts that the router picks among; 1 where it picks experts at once."""
        return int(getattr(config, self.groups, None) or 1) if self.groups else 1

    def top_groups(self, config: Any) -> int:
        """How many of its groups the router picks."""
        groups = self.n_groups(config)
        return int(getattr(config, "topk_group", None) or groups) if groups > 1 else 1


def load_family(model_type: str) -> Family:
    """The FAMILY of moecule/families/<model_type>.py; of a text part `x_text`, that of the whole.

    Raises CheckpointError for a model type that has no file, or is known not to be served.
    """
    refused: dict[str, str] = importlib.import_module("moecule.families").REFUSED
    whole = model_type.removesuffix("_text")
    known = family_names()
    for name in (model_type, whole, f"{whole}_mm_model"):
        if name in refused:
            raise CheckpointError(
                f"model_type {model_type!r} is not served: {refused[name]}; `moecule families` "
                "lists those that are"
            )
        if name in known:
            family: Family = importlib.import_module(f"moecule.families.{name}").FAMILY
            return family
    raise CheckpointError(
        f"model_type {model_type!r} is not a Mixture-of-Experts family that moecule knows; "
        "`moecule families` lists them, docs/add-a-family.md says how to add one"
    )


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Of a config.json, the part that holds the text model's settings; all of it where it is one."""
    for key in INSIDE:
        if isinstance(config.get(key), dict):
            config = config[key]
    return config


def family_names() -> list[str]:
    """Every family there is, sorted."""
    return sorted(p.stem for p in (Path(__file__).parent / "families").glob("[a-z]*.py"))
