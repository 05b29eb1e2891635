"""A folder of a stock model type whose weights are quantised as a config.json says."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig

from moecule.decode import QUANTISED
from moecule.errors import PlanError, VerifyError
from moecule.exports.contents import Contents
from moecule.exports.process import logits_of
from moecule.family import text_part
from moecule.files import write_text
from moecule.folder import copy_into, side_files
from moecule.hf import PACKED, auto_class, quiet
from moecule.moe import experts_in
from moecule.plan import Keep
from moecule.runtime import PackedConfig, keep_from
from moecule.width import width_key


@dataclass(frozen=True)
class Widths:
    """What of a compressed folder is in codes."""

    experts: Mapping[int, tuple[Keep, ...]]  # by layer
    modules: Mapping[str, Keep]  # Linears, by name in memory

    @staticmethod
    def of(contents: Contents, *, routers: bool = False) -> Widths:
        """Raises PlanError where nothing is; and where a router is, unless `routers` may be."""
        config = contents.checkpoint.config
        if config["model_type"] != PACKED:
            raise PlanError(
                f"{contents.checkpoint.path} is a stock checkpoint of 16 bits; it loads as it is, there is "
                "nothing to export (--to transformers copies one that a plan made, and writes its card)"
            )
        packed = PackedConfig(**config[QUANTISED])
        experts = {int(i): tuple(map(keep_from, of.split())) for i, of in packed.experts.items()}
        modules = {name: keep_from(width) for name, width in packed.weights.items()}
        for name in modules:
            linear = isinstance(contents.model.get_submodule(name), nn.Linear)
            if not (linear or routers):
                raise PlanError(
                    f"{name} is rounded and no Linear, which other engines do not load; compress with "
                    "--set rest.router=16"
                )
        return Widths(experts, modules)


def write_rest(
    contents: Contents, widths: Widths, made: Path, quantized: Mapping[str, Any] | None
) -> None:
    """config.json and all that is no weight, into `made`; `quantized`: its quantization_config.

    Raises PlanError where experts are narrower and no key of the config says so.
    """
    config: dict[str, Any] = copy.deepcopy(dict(contents.checkpoint.config))
    config["model_type"] = config.pop("moecule")["model_type"]
    for key in ("auto_map", "expert_skip"):
        config.pop(key, None)
    text = text_part(config)
    (keeps, *_) = widths.experts.values()
    for key in set(contents.family.count_keys) & set(text):
        several = isinstance(text[key], list)
        text[key] = [len(keeps)] * len(text[key]) if several else len(keeps)
    channels = keeps[0].channels
    if channels is not None and {m.down_proj.shape[2] for _, m in experts_in(contents.model)} != {
        channels
    }:
        width = width_key(contents.model, channels)
        if width is None:
            raise PlanError(
                f"experts have {channels} channels, which no key of this family's config says by itself; "
                "compress without dropping channels"
            )
        text[width] = channels
    config.pop(QUANTISED)
    if quantized is not None:
        config[QUANTISED] = dict(quantized)
    write_text(made / "config.json", json.dumps(config, indent=2) + "\n")
    files = side_files(contents.checkpoint.path)
    copy_into(made, (f for f in files if f.name != "export.json"))


def logits_by_transformers(made: Path, ids: list[int]) -> Float[Tensor, "S V"]:
    """What stock transformers computes of the folder, in float32.

    Raises VerifyError where it does not load, or a tensor of it is missing, left over or made up.
    """
    try:
        # what unpacks draws bars of its own
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            settings = AutoConfig.from_pretrained(made)
            model, told = auto_class(type(settings)).from_pretrained(
                made, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as e:
        line = next(iter(str(e).splitlines()), type(e).__name__)
        raise VerifyError(f"transformers does not load what was written: {line}; report it") from e
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[what]:
            said = ", ".join(sorted(map(str, told[what]))[:2])
            raise VerifyError(f"transformers loads what was written with {what}: {said}; report it")
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        logits: Tensor = model.eval()(torch.tensor([ids])).logits[0].float()
    return logits


def logits_in_a_process(made: Path, ids: list[int]) -> Float[Tensor, "S V"]:
    """As `logits_by_transformers`, elsewhere."""
    return logits_of([sys.executable, "-m", __name__, str(made)], ids, "transformers")


if __name__ == "__main__":
    folder, given, answered = map(Path, sys.argv[1:])
    np.save(answered, logits_by_transformers(folder, np.load(given).tolist()).numpy())
