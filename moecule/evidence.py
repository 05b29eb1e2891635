"""How a compressed model was made, for whoever has to believe it: sums of experts, warnings, versions.

`compress` writes it beside result.json, which says what it cost. Both are enough for a report.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from moecule.errors import DataError
from moecule.files import parse_json, write_text
from moecule.plan import Plan
from moecule.stats import COEF, COUNT, MASS, SOFT, load_stats
from moecule.version import VERSION

FILE = "evidence.json"
PACKAGES = ("torch", "transformers", "safetensors", "numpy")
DIGITS = 5  # of sums; a report shows fewer
TRIAL = re.compile(r"trial_([a-z]+)_[a-z]+_b(\d+)_g(\d+)")


@dataclass(frozen=True)
class ExpertSums:
    """Of a layer's experts, over the calibration text; None where the recipe did not count it."""

    count: tuple[float, ...]  # tokens routed to each
    mass: tuple[float, ...] | None = None  # of the router's probability or weights: see `mass`
    trial: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # {bits: error of each}
    channels: int | None = None  # of each expert of the original


@dataclass(frozen=True)
class Evidence:
    """Of one run of compress."""

    command: str | None  # None where a function was called
    versions: Mapping[str, str]
    made_of: Mapping[str, Any]  # as config.json has it: digests, window, batch, dtype
    tokens: int  # of the calibration text
    mass: str | None  # which sum `ExpertSums.mass` is: mass, soft, coef
    trial: str | None  # which error `ExpertSums.trial` is, as in trial.py
    experts: Mapping[int, ExpertSums]  # by layer
    starved: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # experts without a token
    warnings: tuple[str, ...] = ()

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), separators=(",", ":")) + "\n"


def command_line() -> str | None:
    """What was typed, where it was the command line of this package."""
    program = Path(sys.argv[0])
    ours = program.name == "moecule" or program.parts[-2:] == ("moecule", "__main__.py")
    return shlex.join(["moecule", *sys.argv[1:]]) if ours else None


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {
        "python": platform.python_version(),
        "moecule": VERSION,  # also where it is not installed
        **{p: version(p) for p in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
    }


@contextmanager
def noting() -> Iterator[list[str]]:
    """Warnings, as they are given."""
    said: list[str] = []
    show = warnings.showwarning

    def note(message: Warning | str, *rest: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.append(text)
        show(message, *rest, **more)

    warnings.showwarning = note
    try:
        yield said
    finally:
        warnings.showwarning = show


def expert_sums(
    stats: Path,
) -> tuple[dict[int, ExpertSums], str | None, str | None]:
    """(sums of experts by layer, which mass, which trial error), of a stats folder.

    Raises DataError where there is none, or it is damaged.
    """
    sums, meta = load_stats(stats)
    widths = {int(i): e["down"][1] for i, e in meta["inventory"]["experts"].items()}
    names = set.intersection(*(set(of) for of in sums.values()))
    mass = next((s.name for s in (MASS, SOFT, COEF) if s.name in names), None)
    trial = next((t for name in sorted(names) if (t := TRIAL.fullmatch(name))), None)
    found = {}
    for i, of in sorted(sums.items()):
        errors = {}
        if trial is not None:
            columns = of[trial[0]].T
            errors = {int(b): _rounded(column) for b, column in zip(trial[2], columns, strict=True)}
        mine = None if mass is None else _rounded(of[mass])
        found[i] = ExpertSums(_rounded(of[COUNT.name]), mine, errors, widths[i])
    return found, mass, None if trial is None else trial[1]


def gather(out: Path, plan: Plan, said: Sequence[str], earlier: Evidence | None = None) -> Evidence:
    """Of the folder that compress has made; `earlier`: what a run that made part of it had to say.

    Raises DataError where its statistics or its config are damaged.
    """
    experts, mass, trial = expert_sums(out / "stats")
    noted = _config(out).get("moecule", {})
    made_of = {"source": plan.digest, **noted.get("made_of", {})}
    warned = earlier.warnings if earlier is not None and earlier.made_of == made_of else ()
    meta = load_stats(out / "stats")[1]
    return Evidence(
        command=command_line(),
        versions=versions(),
        made_of=made_of,
        tokens=meta["window"][0] * meta["window"][1],
        mass=mass,
        trial=trial,
        experts=experts,
        starved={int(i): tuple(ids) for i, ids in noted.get("starved", {}).items()},
        warnings=tuple(dict.fromkeys([*warned, *said])),
    )


def save_evidence(evidence: Evidence, out: Path) -> None:
    """Beside the result. Raises OutputError where it cannot be written."""
    write_text(out / FILE, evidence.dumps())


def load_evidence(out: Path) -> Evidence | None:
    """What the folder has of it, if anything. Raises DataError where it is damaged."""
    file = out / FILE
    if not file.is_file():
        return None
    try:
        doc = parse_json(file.read_text())
        doc["experts"] = {int(i): _sums(of) for i, of in doc["experts"].items()}
        doc["starved"] = {int(i): tuple(ids) for i, ids in doc["starved"].items()}
        doc["warnings"] = tuple(doc["warnings"])
        return Evidence(**doc)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        why = " ".join(str(e).split())
        raise DataError(f"{file} is damaged ({why}); remove it, or compress again") from e


def _sums(doc: Mapping[str, Any]) -> ExpertSums:
    trial = {int(b): tuple(map(float, of)) for b, of in doc["trial"].items()}
    mass = None if doc["mass"] is None else tuple(map(float, doc["mass"]))
    return ExpertSums(tuple(map(float, doc["count"])), mass, trial, doc["channels"])


def _config(out: Path) -> dict[str, Any]:
    file = out / "config.json"
    try:
        doc = parse_json(file.read_text())
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be read ({e}); compress again") from e
    return doc if isinstance(doc, dict) else {}


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values.tolist())
