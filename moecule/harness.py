"""Tasks asked of a loaded model by lm-evaluation-harness, whose extra is moecule[eval].

The harness makes the requests, batches them, scores the answers and says the standard errors; here
are only its configs for our task files, the model that it is handed, and a check that what it is
asked fits the model. This module is imported where tasks are asked and nowhere else.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy
import torch
from datasets import Dataset
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable
from lm_eval import evaluator
from lm_eval.api import task as api_task
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moecule.data import check_tokens
from moecule.errors import DataError, RecipeError
from moecule.session import Progress, ticker
from moecule.suite import GENERATE, Suite, TaskFile, asked, is_answer, read_task, task_files

SEEDS = {"random": 0, "other": 1234}  # those of the harness' own command
ANSWER_TOKENS = 32  # of an answer in the model's own words; it ends with its line
NO_MEANS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "mcc", "f1")
Values = Mapping[str, Mapping[str, Sequence[float]]]  # {task: {metric: of each item}}


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


@dataclass(frozen=True)
class Scores:
    """Of one model: {task: {metric, metric_stderr, n}}, each item's, and how many items were cut."""

    tasks: Mapping[str, Mapping[str, float]]
    values: Values
    groups: Mapping[str, Sequence[str]]  # the tasks of each
    cut: Mapping[str, int]  # items longer than the model's window, cut from the left


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Within, what the harness and its libraries tell is not shown; nothing goes to stdout."""
    log, bars = logging.getLogger("lm_eval"), api_task.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    api_task.tqdm = partial(bars, disable=True)  # it has no switch
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
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
    with _quietly():
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
        raise RecipeError(f"{name} has {len(records)} items, {shots} are to be solved before each")
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
    with _quietly():
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
        task.set_fewshot_seed(seed=SEEDS["other"])
    return found


def _near(name: str, names: Any) -> str:
    known = list(names)
    return ", ".join(difflib.get_close_matches(name, known, 5, 0.4) or sorted(known)[:5])


@dataclass
class _Ticks:
    """Where the harness would keep an answer it has, so that it is told of each."""

    tick: Callable[[], None] = lambda: None

    def add_partial(self, attr: str, request: Any, answer: Any) -> None:
        self.tick()


@dataclass
class _Cut:
    """Items that were longer than the window, by task."""

    of: dict[str, set[int]] = field(default_factory=dict)

    def add(self, request: Any) -> None:
        self.of.setdefault(request.task_name, set()).add(request.doc_id)


class _Asked(HFLM):  # type: ignore[misc]
    """The harness' model of transformers: ours, and what does not fit it is refused or counted."""

    def __init__(
        self, model: Any, tokenizer: Any, batch: int, progress: Progress, what: str
    ) -> None:
        # bf16 probabilities tie, and a tie goes to the first choice
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch,
            softmax_dtype="float32",
        )
        self.progress, self.what = progress, what
        self.cut = _Cut()
        self.requests: list[Any] = []

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.requests = []
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Any:
        for i, ((_, answer), before, after) in enumerate(requests):
            self._check(before + after)
            if not after or len(after) > self.max_length:
                raise DataError(
                    f"{answer[:40]!r} is {len(after)} tokens and the model knows {self.max_length}; "
                    "leave that item out"
                )
            if self.requests and len(before) + len(after) > self.max_length + 1:
                self.cut.add(self.requests[i])
        self.cache_hook = _Ticks(ticker(self.progress, self.what, len(requests)))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        for request in requests:
            text, how = request.args
            ids, new = self.tok_encode(text), how.get("max_gen_toks", self.max_gen_toks)
            self._check(ids)
            if new >= self.max_length:
                raise DataError(
                    f"{request.task_name} asks for {new} new tokens and the model knows "
                    f"{self.max_length}; leave the task out"
                )
            if len(ids) > self.max_length - new:
                self.cut.add(request)
        tick = ticker(self.progress, f"{self.what}, generated", len(requests))
        self.cache_hook = _Ticks(tick)
        return super().generate_until(requests, disable_tqdm=True)

    def _check(self, ids: list[int]) -> None:
        check_tokens(torch.tensor(ids or [0]), self.config)


def score(model: Any, tokenizer: Any, prepared: Prepared, progress: Progress, what: str) -> Scores:
    """Ask a loaded model everything. Raises DataError for items that no model of its kind can be asked.

    `what`: the name of the progress. Warns of items that were cut.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer names no end of text, which tasks begin with; set eos_token")
    suite = prepared.suite
    with _quietly():
        asking = _Asked(model, tokenizer, suite.batch, progress, what)
        random.seed(SEEDS["random"])
        numpy.random.seed(SEEDS["other"])
        torch.manual_seed(SEEDS["other"])
        found = evaluator.evaluate(asking, prepared.tasks, limit=suite.limit)
    cut = {name: len(items) for name, items in sorted(asking.cut.of.items())}
    if cut:
        said = ", ".join(f"{n} of {name}" for name, n in cut.items())
        warnings.warn(
            f"items longer than the {asking.max_length} tokens that the model knows were cut from "
            f"the left: {said}",
            stacklevel=2,
        )
    return Scores(_flat(found), _values(found["samples"]), found["group_subtasks"], cut)


def _flat(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{task: {metric: value, metric_stderr, n}}; a filter that has a name is named after a slash."""
    out: dict[str, dict[str, float]] = {}
    for name, row in {**found["results"], **found.get("groups", {})}.items():
        out[name] = {"n": int(row["sample_len"])}
        for key, value in row.items():
            metric, comma, chosen = key.partition(",")
            if comma and isinstance(value, (int, float)):
                plain = metric.removesuffix("_stderr")
                shown = plain if chosen == "none" else f"{plain}/{chosen}"
                out[name][shown + ("_stderr" if plain != metric else "")] = float(value)
    return out


def _values(samples: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, list[float]]]:
    out: dict[str, dict[str, list[float]]] = {}
    for name, items in samples.items():
        for item in items:
            for metric in item["metrics"]:
                value, chosen = item[metric], item["filter"]
                if isinstance(value, (int, float)):
                    shown = metric if chosen == "none" else f"{metric}/{chosen}"
                    out.setdefault(name, {}).setdefault(shown, []).append(float(value))
    return out


def changes(before: Scores, after: Scores) -> dict[str, dict[str, float]]:
    """{task: {metric: after - before, metric_stderr}}, of the items' own differences.

    Both models answered the same items, so this error is smaller than either model's own. A group's
    is of the mean of its tasks. Metrics that are no means of items have a difference alone.
    """
    out: dict[str, dict[str, float]] = {}
    for name, row in after.tasks.items():
        out[name] = {}
        for metric in (m for m in row if m != "n" and not m.endswith("_stderr")):
            out[name][metric] = row[metric] - before.tasks[name][metric]
            errors = [
                _paired(before.values, after.values, task, metric)
                for task in after.groups.get(name) or [name]
            ]
            if all(e is not None for e in errors):
                squares = sum(e**2 for e in errors if e is not None)
                out[name][f"{metric}_stderr"] = math.sqrt(squares) / len(errors)
    return out


def _paired(before: Values, after: Values, task: str, metric: str) -> float | None:
    """The standard error of the mean difference; None for fewer than 2 items."""
    pairs = zip(
        before.get(task, {}).get(metric, []), after.get(task, {}).get(metric, []), strict=True
    )
    differences = [b - a for a, b in pairs]
    n = len(differences)
    if n < 2 or metric in NO_MEANS:
        return None
    mean = sum(differences) / n
    return math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
