"""The tasks that are asked, as lm-evaluation-harness has them: made of task files, or its own.

Here are configs for our files, as a user of the harness would write them in YAML. This module and
`harness.py` need the extra moecule[eval], and are imported where tasks are asked and nowhere else.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable
from lm_eval.api import task as api_task
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import TaskManager

from moecule.errors import DataError, RecipeError
from moecule.suite import GENERATE, Suite, TaskFile, asked, is_answer, read_task, task_files

SHOTS_SEED = 1234  # that of the harness' own command
LOGS = ("lm_eval", "datasets", "huggingface_hub")
ANSWER_TOKENS = 32  # of an answer in the model's own words; it ends with its line


@dataclass(frozen=True)
class Prepared:
    """Tasks that are there and can be asked."""

    suite: Suite
    tasks: Mapping[str, Any]  # the harness' own, as its manager hands them over
    digests: Mapping[str, str]  # of task files

    def as_dict(self) -> dict[str, Any]:
        """For result.json: what the scores depend on besides the model."""
        return {
            "lm_eval": version("lm_eval"),
            "files": dict(self.digests),
            "limit": self.suite.limit,
            "shots": self.suite.shots,
            "batch": self.suite.batch,
            "groups": {name: of for name, of in self.tasks.get("group_map", {}).items()},
        }


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within, what the harness and its libraries tell is not shown; nothing goes to stdout."""
    logs, bars = [logging.getLogger(name) for name in LOGS], api_task.tqdm
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    api_task.tqdm = partial(bars, disable=True)  # it has no switch
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        api_task.tqdm = bars


def prepare(suite: Suite) -> Prepared:
    """Read the files and find the tasks. Raises RecipeError for a name that is none, DataError for a
    file that is damaged and for a task of the Hub that cannot be had."""
    files = task_files(suite.folder) if suite.folder is not None else {}
    tasks, digests, hub = [], {}, []
    for name in dict.fromkeys(suite.names or files):
        plain, _, kind = name.partition(":")
        of = plain if plain in files else next((f for f in files if name.startswith(f"{f}_")), None)
        if of is None:
            hub.append(name)
            continue
        found = read_task(files[of], of)
        digests[of] = found.digest
        tasks.append(_of_file(found, name, kind, suite.shots or 0))
    with quietly():
        tasks += _of_hub(hub, suite, files)
        try:
            return Prepared(suite, TaskManager(include_defaults=False).load(tasks), digests)
        except ValueError as e:  # a task and a group that holds it
            raise RecipeError(f"{e}; name one of them") from e


def _of_file(file: TaskFile, name: str, kind: str, shots: int) -> Any:
    """The task of a file, one of its groups, or all of them as a group of the harness."""
    if kind not in ("", GENERATE) or (kind and file.kind != "cloze"):
        raise RecipeError(
            f"task {name}: wanted {file.name}, or NAME:{GENERATE} for a file of ctx and target "
            f"({file.name} holds {file.kind})"
        )
    kind, groups = kind or file.kind, file.groups
    if name.partition(":")[0] in groups:
        return _task(name, groups[name.partition(":")[0]], kind, file.digest, shots)
    if name.partition(":")[0] != file.name:
        raise RecipeError(f"{file.name} has no group for {name}; it has {_near(name, groups)}")
    means = [
        AggMetricConfig(metric=m["metric"], aggregation="mean", weight_by_size=False)
        for m in _CONFIGS[kind]["metric_list"]
    ]
    whole = Group(name, aggregate_metric_list=means)
    for group, records in groups.items():
        whole.add(_task(group, records, kind, file.digest, shots))
    return whole


def _task(name: str, records: Sequence[Any], kind: str, digest: str, shots: int) -> Any:
    """As the harness would read it from a YAML file. The first records are the solved ones."""
    if len(records) <= shots:
        raise RecipeError(
            f"{name} has {len(records)} items, {shots} are to be solved before each; give fewer"
        )
    docs = asked(records, kind)
    table = InMemoryTable.from_pylist(docs[shots:])
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset(table, fingerprint=f"{name} {digest}")},
        "test_split": "test",
        "doc_to_text": "text",
        "target_delimiter": "",
        "num_fewshot": shots,
        "fewshot_config": {"sampler": "first_n", "samples": docs[:shots]},
        **_CONFIGS[kind],
    }
    with quietly():
        return ConfigurableTask(config=config)


def _metrics(**higher: bool) -> list[dict[str, Any]]:
    return [
        {"metric": name, "aggregation": "mean", "higher_is_better": up}
        for name, up in higher.items()
    ]


_CONFIGS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": _metrics(acc=True, acc_norm=True),
    },
    "pairs": {
        "output_type": "multiple_choice",
        "target_delimiter": " ",  # as in the harness' own BLiMP
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": _metrics(acc=True),
    },
    "schema": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",  # a number: the choices are contexts
        "doc_to_choice": "options",
        "doc_to_target": "continuation",
        "metric_list": _metrics(acc=True),
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_target": "target",
        "process_results": lambda doc, found: {
            "acc": float(found[0][1]),
            "target_nats": -found[0][0],
        },
        "metric_list": _metrics(acc=True, target_nats=False),
    },
    GENERATE: {
        "output_type": "generate_until",
        "doc_to_target": "target",
        "target_delimiter": " ",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False},
        "process_results": lambda doc, found: {
            "exact_match": float(is_answer(found[0], doc["target"]))
        },
        "metric_list": _metrics(exact_match=True),
    },
}


def _of_hub(names: Sequence[str], suite: Suite, files: Mapping[str, Any]) -> list[Any]:
    """Tasks of the harness itself, whose data comes from the Hub or its cache."""
    if not names:
        return []
    manager = TaskManager()
    found: list[Any] = []
    for name in names:
        if name not in manager.all_tasks:
            where = f", nor a file of {suite.folder}" if files else ""
            near = _near(name, [*files, *manager.all_tasks])
            raise RecipeError(f"{name} is no task of lm-evaluation-harness{where}; near it: {near}")
        try:
            loaded = manager.load([name])
        except (OSError, DatasetsError, ImportError, ValueError, RuntimeError) as e:
            said = next(iter(str(e).splitlines()), type(e).__name__)
            raise DataError(
                f"task {name} cannot be had ({said}); it needs the network once, or give a file of "
                "your own (--task-dir)"
            ) from e
        found += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    for task in TaskManager(include_defaults=False).load(found)["tasks"].values():
        if suite.shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=suite.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SHOTS_SEED)
    return found


def _near(name: str, names: Any) -> str:
    known = list(names)
    return ", ".join(difflib.get_close_matches(name, known, 5, 0.4) or sorted(known)[:5])
