"""Tasks asked of a loaded model by lm-evaluation-harness, whose extra is moecule[eval].

The harness makes the requests, batches them, scores the answers and says the standard errors. Here
are only the model that it is handed, a check that what it is asked fits that model, and what changed
from one model to another. `exam.py` has the tasks.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from moecule.data import check_tokens
from moecule.errors import DataError
from moecule.exam import Prepared, quietly
from moecule.session import Progress, ticker

SEEDS = {"random": 0, "other": 1234}  # those of the harness' own command
NO_MEANS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "mcc", "f1")
Values = Mapping[str, Mapping[str, Sequence[float]]]  # {task: {metric: of each item}}


@dataclass(frozen=True)
class Scores:
    """Of one model: {task: {metric, metric_stderr, n}}, each item's, and how many items were cut."""

    tasks: Mapping[str, Mapping[str, float]]
    values: Values
    groups: Mapping[str, Sequence[str]]  # the tasks of each
    cut: Mapping[str, int]  # items longer than the model's window, cut from the left


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
    with quietly():
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
