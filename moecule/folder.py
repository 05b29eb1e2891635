"""The folder of a compressed checkpoint: config, plan, card."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moecule import runtime
from moecule.apply import Applied, is_stock
from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError
from moecule.evidence import FILE as EVIDENCE
from moecule.family import TOP_K_KEYS, Family, text_part
from moecule.files import write_text, writing
from moecule.hf import auto_name
from moecule.licence import head_of, licence_of
from moecule.order import save_plan
from moecule.plan import Keep, Plan

REQUIRED = "moecule_required"
HEALED = "healed"  # in config.json, of a checkpoint that was trained after it was made
LEARNT = "masks"  # in config.json, of a checkpoint whose masks were learnt after it was made
REQUIRED_CODE = '''"""This checkpoint's experts are packed by moecule: pip install moecule."""

import moecule
from moecule.runtime import MoeculeConfig, MoeculeForCausalLM
'''


def side_files(source: Path) -> list[Path]:
    """Tokenizer, generation settings, chat template, licence: all but weights and config."""
    kinds, ours = (
        (".json", ".jinja", ".model", ".txt"),
        ("config.json", "result.json", EVIDENCE),
    )
    return [
        file
        for file in sorted(source.iterdir())
        if (file.suffix in kinds or file.name.startswith("LICENSE"))
        and not (file.name in ours or file.name.startswith("README"))
        and not file.name.endswith(".index.json")  # of weights in another form
        and file.is_file()
    ]


def copy_into(folder: Path, files: Iterable[Path]) -> None:
    """The files, by their names. Raises OutputError where one cannot be written."""
    for file in files:
        with writing(folder / file.name):
            shutil.copyfile(file, folder / file.name)


# what a killed compress leaves in its folder and takes away when it goes on
_KILLED = (
    *("stats.partial", "stats.lock", "losses.partial", "losses.lock"),
    *("masks.partial", "masks.lock"),
    *("plan.yaml.partial", "plan.channels.partial", "result.json.partial"),
    f"{EVIDENCE}.partial",
)


def remains(out: Path, source: Path) -> set[str]:
    """What may lie in `out` before a checkpoint is put there: what this package makes besides it.

    A plan marks the folder as ours; then all that a checkpoint has but config and weights may stay
    and is written anew.
    """
    ours = {"stats", "plan.yaml", "plan.channels", *(f".{n}" for n in _KILLED)}
    if not (out / "plan.yaml").is_file():
        return ours
    ours |= {"result.json", EVIDENCE, "README.md", f"{REQUIRED}.py", "report.html", "report.md"}
    return ours | {file.name for file in side_files(source)}


def made_of(out: Path, plan: Plan) -> Any:
    """What `apply` noted that the checkpoint in `out` was made of, with this very plan.

    None where there is none, it does not open, or the plan beside it is another.
    """
    said, config = out / "plan.yaml", out / "config.json"
    if not (said.is_file() and config.is_file()) or said.read_bytes() != plan.dumps().encode():
        return None
    try:
        noted = Checkpoint.open(out.absolute()).config.get("moecule", {})
        return None if HEALED in noted else noted.get("made_of")
    except CheckpointError:  # it is not whole
        return None


def write_config(
    folder: Path,
    source: Checkpoint,
    family: Family,
    plan: Plan,
    done: Applied,
    made_of: Mapping[str, Any] | None = None,
) -> None:
    """config.json and all that is neither weights nor stats, into `folder`.

    `made_of`: for config.json to say, so that the same request is known again.
    Raises OutputError where a file cannot be written.
    """
    config: dict[str, Any] = copy.deepcopy(dict(source.config))
    config.pop("moecule", None)  # of how the source was made
    text = text_part(config)
    if plan.top_k is not None:
        set_number(text, TOP_K_KEYS, plan.top_k)
    if is_stock(plan, done.width_key):
        config.pop("auto_map", None)  # names code that is not copied, and not needed
        keeps = [f for f in next(iter(plan.layers.values())) if isinstance(f, Keep)]
        set_number(text, family.count_keys, len(keeps))
        if done.width_key is not None and keeps[0].channels is not None:
            text[done.width_key] = keeps[0].channels
    else:
        config |= _packed_config(source, plan, done)
        write_text(folder / f"{REQUIRED}.py", REQUIRED_CODE)
    noted = {} if made_of is None else {"made_of": dict(made_of)}
    if done.starved:
        noted["starved"] = {str(i): ids for i, ids in sorted(done.starved.items())}
    if noted:
        config["moecule"] = {**config.get("moecule", {}), **noted}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    copy_into(folder, side_files(source.path))
    save_plan(plan, folder / "plan.yaml")
    write_text(folder / "README.md", _card(source, plan, done))


def set_number(text: dict[str, Any], keys: Sequence[str], value: int) -> None:
    """Of a config, whichever of the keys there are; some have a number for each layer."""
    for key in set(keys) & set(text):
        text[key] = [value] * len(text[key]) if isinstance(text[key], list) else value


def _packed_config(source: Checkpoint, plan: Plan, done: Applied) -> dict[str, Any]:
    return {
        "model_type": runtime.MODEL_TYPE,
        "moecule": {"model": source.name, "model_type": source.config["model_type"]},
        "auto_map": {
            "AutoConfig": f"{REQUIRED}.MoeculeConfig",
            **dict.fromkeys(
                ("AutoModelForCausalLM", auto_name(source.config["model_type"])),
                f"{REQUIRED}.MoeculeForCausalLM",
            ),
        },
        "expert_skip": False,
        "quantization_config": {
            "quant_method": runtime.MODEL_TYPE,
            "format": runtime.FORMAT,
            "experts": done.experts,
            "weights": done.weights,
            **({"aliased": done.aliased} if done.aliased else {}),
            "skip": None if plan.skip is None else plan.skip.settings(),
        },
    }


def _card(source: Checkpoint, plan: Plan, done: Applied) -> str:
    starved = "".join(
        f"\nLayer {i}: no calibration token reached experts {ids}; they were rounded to nearest."
        for i, ids in done.starved.items()
    )
    starved += "".join(
        f"\nLayer {i}: {share:.1%} of the channels of experts that were dropped went into others."
        for i, share in done.moved.items()
    )
    auto = auto_name(source.config["model_type"])
    needs = (
        ""
        if is_stock(plan, done.width_key)
        else "import moecule  # pip install moecule; registers the packed layers\n"
    )
    licence = licence_of(source.path)  # for export's card, which sees this one alone
    head = f"{head_of(licence)}\n" if licence else ""
    return f"""{head}# {Path(source.name).name}, compressed

Made by moecule from `{source.name}` ({source.digest}): {plan.nominal_bits:.2f} code bits a routed
expert's weight. `plan.yaml` says what became of every expert, `result.json` what it cost.

```python
{needs}from transformers import {auto}

model = {auto}.from_pretrained(folder)
```
{starved}
"""
