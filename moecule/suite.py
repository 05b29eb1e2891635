"""Task files: JSON lines of questions with known answers, read, checked and made ready to be asked.

Four kinds of record, told apart by their keys; what else a record holds is left alone:

    choices  {"ctx", "choices", "gold"}                      which choice goes on from the context
    cloze    {"ctx", "target"}                               does the likeliest text go on so
    schema   {"context_options", "continuation", "gold"}     after which context it is likeliest
    pairs    {"good", "bad"}                                 is the good sentence the likelier

and `generate`, which is asked for: records of `cloze`, answered in the model's own words. `exam.py`
hands them to the harness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecule.data import check_text, read_text
from moecule.errors import DataError, RecipeError
from moecule.files import parse_json

KINDS = {
    "choices": ("ctx", "choices", "gold"),
    "cloze": ("ctx", "target"),
    "schema": ("context_options", "continuation", "gold"),
    "pairs": ("good", "bad"),
}
GENERATE = "generate"  # NAME:generate asks for the answer of a cloze task in the model's own words
SUFFIXES = (".jsonl", ".jsonl.xz")
BATCH = 8  # requests that pass together


@dataclass(frozen=True)
class Suite:
    """What a model is asked: tasks of lm-evaluation-harness by name, and those of a folder of files."""

    names: tuple[str, ...] = ()  # none: all of the folder
    folder: str | Path | None = None
    limit: int | None = None  # items of each task; None: all
    shots: int | None = None  # solved items before each; None: as the task has it
    batch: int = BATCH  # requests that pass together

    def __post_init__(self) -> None:
        """Raises RecipeError for what cannot be asked."""
        if not self.names and self.folder is None:
            raise RecipeError("no task was named; give --tasks piqa,arc_easy or --task-dir DIR")
        for name, value, least in (
            ("limit", self.limit, 1),
            ("shots", self.shots, 0),
            ("batch", self.batch, 1),
        ):
            if value is not None and value < least:
                raise RecipeError(f"{name} of tasks = {value}, wanted {least} or more")


@dataclass(frozen=True)
class TaskFile:
    """One file of records of one kind."""

    name: str
    kind: str
    records: tuple[Mapping[str, Any], ...]
    digest: str  # sha256 of the file, 16 hex digits

    @property
    def groups(self) -> dict[str, list[Mapping[str, Any]]]:
        """{NAME_GROUP: its records}; {NAME: all} where records name no group."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for record in self.records:
            group = record.get("group")
            found.setdefault(self.name if group is None else f"{self.name}_{group}", []).append(
                record
            )
        return found


def task_files(folder: str | Path) -> dict[str, Path]:
    """{NAME: the file NAME.jsonl or NAME.jsonl.xz}. Raises DataError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give --task-dir one of task files NAME.jsonl")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        for suffix in SUFFIXES:
            if file.name.endswith(suffix) and file.is_file():
                found[file.name.removesuffix(suffix)] = file
    if not found:
        raise DataError(f"{folder} holds no task file; wanted one named NAME.jsonl")
    return found


def read_task(file: Path, name: str) -> TaskFile:
    """The records of a file. Raises DataError, naming the line, for one that is none of the kinds."""
    text = read_text(file)
    # not splitlines(): a JSON string may hold U+2028 and the like
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file} holds no record; wanted one a line")
    records, first = [], ""
    for n, line in lines:
        where = f"{file}, line {n}"
        try:
            record = parse_json(line)
        except ValueError as e:
            raise DataError(f"{where}: not JSON ({e}); wanted a record a line") from e
        kind = _kind_of(record, where)
        first = first or kind
        if kind != first:
            raise DataError(f"{where}: of kind {kind} after {first}; give each kind its own file")
        _check(record, kind, where)
        records.append(record)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return TaskFile(name, first, tuple(records), digest)


def _kind_of(record: Any, where: str) -> str:
    for kind, keys in KINDS.items():
        if isinstance(record, dict) and all(key in record for key in keys):
            return kind
    wanted = "; ".join(", ".join(keys) for keys in KINDS.values())
    found = sorted(record) if isinstance(record, dict) else repr(record)[:40]
    raise DataError(f"{where}: found {found}, wanted the keys of one kind ({wanted})")


def _check(record: Mapping[str, Any], kind: str, where: str) -> None:
    """Raise DataError for values that are none of the kind's."""
    for key in KINDS[kind]:
        value = record[key]
        if key in ("choices", "context_options"):
            if not isinstance(value, list) or len(value) < 2:
                raise DataError(f"{where}: {key} is {value!r:.40}, wanted a list of 2 or more")
            for one in value:
                _check_text(one, key, where)
        elif key == "gold":
            last = len(record["choices" if kind == "choices" else "context_options"]) - 1
            if type(value) is not int or not 0 <= value <= last:
                raise DataError(f"{where}: gold is {value!r:.40}, wanted a number from 0 to {last}")
        else:
            _check_text(value, key, where, may_be_empty=key == "ctx")
    if not isinstance(record.get("group", ""), str):
        raise DataError(f"{where}: group is {record['group']!r:.40}, wanted text")


def _check_text(value: Any, key: str, where: str, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise DataError(f"{where}: {key} holds {value!r:.40}, wanted text")
    check_text(value, f"{where}, {key}")


def asked(records: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records as the harness asks them: the text before the answer ends where the answer begins."""
    make: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "choices": lambda r: {
            "text": _before(_question(r["ctx"]), r["choices"]),
            "choices": r["choices"],
            "gold": r["gold"],
        },
        "cloze": lambda r: {"text": _before(r["ctx"], [r["target"]]), "target": r["target"]},
        "schema": lambda r: {
            "options": [_before(c, [r["continuation"]]) for c in r["context_options"]],
            "continuation": r["continuation"],
            "gold": r["gold"],
        },
        "pairs": lambda r: {"text": "", "choices": [r["good"], r["bad"]], "gold": 0},
        # the space belongs to what the model says
        GENERATE: lambda r: {"text": _prompt(r["ctx"]), "target": r["target"].strip()},
    }
    return [make[kind](r) for r in records]


def _before(text: str, answers: Sequence[str]) -> str:
    """With a space at its end, where neither it nor an answer has any."""
    apart = not text or text[-1].isspace() or any(a[0].isspace() for a in answers)
    return text if apart else text + " "


def _question(text: str) -> str:
    """What asks is followed by "Answer:", as in the harness' own PIQA, ARC and BoolQ."""
    last = text.strip().rpartition("\n")[2]
    if last.startswith("Question:") and not last.endswith(":") or last.endswith("?"):
        return f"{text.rstrip()}\nAnswer:"
    return text


def _prompt(text: str) -> str:
    """For an answer in the model's own words: as in the harness' GSM8K, where it is a question."""
    if text.rstrip().endswith("?") and "Question:" not in text:
        text = f"Question: {text}"
    return _question(text).rstrip()


def is_answer(said: str, target: str) -> bool:
    """Whether an answer begins with the target: as many words, but for case and signs around them.

    >>> is_answer(" 91 bottle caps", "91"), is_answer(" The answer is 91", "91")
    (True, False)
    """
    words = [w.strip(".,;:!?\"'()[]$").lower() for w in said.split()]
    wanted = [w.strip(".,;:!?\"'()[]$").lower() for w in target.split()]
    return words[: len(wanted)] == wanted
