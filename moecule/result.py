"""What was measured of a model, as a file and as a table for a person."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from moecule.budget import format_size
from moecule.depth import Depth, Sampled, Skipped
from moecule.errors import DataError
from moecule.files import parse_json
from moecule.measure import Loss, Throughput
from moecule.paired import gap

_NUMBERS = re.compile(r"\[\n[\s\d.,e+-]+\]")


@dataclass(frozen=True)
class Result:
    """Everything measured of one model; `None` where there was nothing to measure it against."""

    model: str
    against: str | None
    loss_nats: float
    perplexity: float
    kl_nats: float | None
    top1_agreement: float | None
    original_loss_nats: float | None
    by_file: Mapping[str, Loss]
    window: int
    size_bytes: int  # of all tensors on disk
    expert_bytes: int  # of the routed experts' tensors on disk
    bits_per_weight: float  # true: routed experts' bits with scales, zeros and padding, a weight
    nominal_bits: float  # mean code bits over the routed experts' weights, as papers count
    model_bits_per_weight: float  # true, over all weights of the model
    bytes_by_part: Mapping[str, int]
    memory_bytes: int  # of all parameters and buffers as loaded
    experts_run: float  # share of (token, expert) pairs that ran, over the text
    prefill_tokens_per_s: float | None  # None: the whole model does not fit the device
    decode_tokens_per_s: float | None
    device: str
    dtype: str
    plan_digest: str | None = None
    peak_memory_bytes: Mapping[str, int] = field(
        default_factory=dict
    )  # host and device, of compress
    seconds: Mapping[str, float] = field(default_factory=dict)  # by verb
    # {task: {metric, metric_stderr, n}}, and what changed, by the items' own differences
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    task_changes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    suite: Mapping[str, Any] = field(default_factory=dict)  # what was asked, and by what
    throughput: Throughput | None = None
    digest: str | None = None  # of the checkpoint
    text_digests: Mapping[str, str] = field(default_factory=dict)  # of the tokens, by file
    step_bytes: float | None = (
        None  # that decoding a token must read: an average expert's, as loaded
    )
    read_bytes_per_s: float | None = None  # at which the device reads a large tensor
    sampled: Sampled | None = None  # by layer, on a sample of the text
    command: str | None = None  # that measured it; None where a function was called
    versions: Mapping[str, str] = field(default_factory=dict)
    original: Result | None = None  # measured beside it

    def dumps(self) -> str:
        """As JSON; a list of numbers is one line."""
        text = json.dumps(asdict(self), indent=2)
        return _NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n"


def mean_loss(by_file: Mapping[str, Loss]) -> dict[str, float | None]:
    """The files' means, each file counting once."""
    out: dict[str, float | None] = {}
    for name in ("loss_nats", "kl_nats", "top1_agreement", "original_loss_nats"):
        values = [getattr(r, name) for r in by_file.values()]
        out[name] = None if None in values else sum(values) / len(values)
    return out


def table(before: Result, after: Result) -> list[tuple[str, str, str, str]]:
    """Rows of (what, before, after, change) for a person."""
    rows = [
        _row("size, MB", before.size_bytes / 1e6, after.size_bytes / 1e6, "{:.2f}", ratio=True),
        _row(
            "routed experts, MB",
            before.expert_bytes / 1e6,
            after.expert_bytes / 1e6,
            "{:.2f}",
            ratio=True,
        ),
        _row("bits a weight, nominal", before.nominal_bits, after.nominal_bits, "{:.2f}"),
        _row("bits a weight, true", before.bits_per_weight, after.bits_per_weight, "{:.2f}"),
        _row(
            "bits a weight, whole model",
            before.model_bits_per_weight,
            after.model_bits_per_weight,
            "{:.2f}",
        ),
        (
            "loss, nats a token",
            f"{before.loss_nats:.4f}",
            f"{after.loss_nats:.4f}",
            str(gap(after.by_file, before.by_file)),
        ),
        _row("perplexity", before.perplexity, after.perplexity, "{:.3f}"),
    ]
    if after.kl_nats is not None and after.top1_agreement is not None:
        rows.append(("KL to the original, nats", "0", f"{after.kl_nats:.4f}", ""))
        rows.append(("same likeliest token", "100 %", f"{100 * after.top1_agreement:.1f} %", ""))
    rows.append(("experts run", "100 %", f"{100 * after.experts_run:.1f} %", ""))
    rows.append(
        _row(
            "prompt tokens/s",
            before.prefill_tokens_per_s,
            after.prefill_tokens_per_s,
            "{:.0f}",
            ratio=True,
        )
    )
    rows.append(
        _row(
            "decoded tokens/s",
            before.decode_tokens_per_s,
            after.decode_tokens_per_s,
            "{:.1f}",
            ratio=True,
        )
    )
    return rows + _throughput_rows(before, after) + _task_rows(before, after)


def _throughput_rows(before: Result, after: Result) -> list[tuple[str, str, str, str]]:
    a, b = before.throughput, after.throughput
    if a is None or b is None:
        return []
    held = f"in {format_size(b.memory_bytes)}"
    ratio = f"x {b.sequences / a.sequences:.3f}" if a.sequences else ""
    rate = "decoded tokens/s of all"
    return [
        (f"sequences {held}", str(a.sequences), str(b.sequences), ratio),
        _row(rate, a.decode_tokens_per_s, b.decode_tokens_per_s, "{:.1f}", ratio=True),
    ]


def _task_rows(before: Result, after: Result) -> list[tuple[str, str, str, str]]:
    """Each metric with its standard error; the change's is of the items' own differences."""
    return [
        (
            f"{task}, {metric}",
            shown(before.tasks[task], metric),
            shown(row, metric),
            shown(after.task_changes[task], metric, "+"),
        )
        for task, row, metric in told(after)
        if before.tasks
    ]


def in_groups(result: Result) -> set[str]:
    """The tasks that a group's mean is of."""
    return {task for of in result.suite.get("groups", {}).values() for task in of}


def told(result: Result) -> list[tuple[str, Mapping[str, float], str]]:
    """(task, its numbers, the name of a metric); of a group its mean alone."""
    inside = in_groups(result)
    return [
        (task, row, metric)
        for task, row in result.tasks.items()
        if task not in inside
        for metric in row
        if metric != "n" and not metric.endswith("_stderr")
    ]


def shown(row: Mapping[str, float], metric: str, sign: str = "") -> str:
    """A metric and its standard error, for a person; "absent" where it was not measured."""
    if metric not in row:
        return "absent"
    error = row.get(f"{metric}_stderr")
    return f"{row[metric]:{sign}.4f}" + ("" if error is None else f" \u00b1 {error:.4f}")


def _row(
    what: str, a: float | None, b: float | None, form: str, *, ratio: bool = False
) -> tuple[str, str, str, str]:
    if a is None or b is None:
        shown = ["does not fit" if x is None else form.format(x) for x in (a, b)]
        return what, shown[0], shown[1], ""
    change = f"x {b / a:.3f}" if ratio else f"{b - a:+.4f}" if "4" in form else f"{b - a:+.2f}"
    return what, form.format(a), form.format(b), change


def load_result(path: Path) -> Result:
    """The result that was written. Raises DataError where it is damaged."""
    try:
        return _result(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise DataError(
            f"{path} is no result of moecule evaluate ({' '.join(str(e).split())}); evaluate again"
        ) from e


def _result(doc: dict[str, Any]) -> Result:
    doc["by_file"] = {name: _loss(of) for name, of in doc["by_file"].items()}
    if doc.get("throughput") is not None:
        doc["throughput"] = Throughput(**doc["throughput"])
    if doc.get("sampled"):
        doc["sampled"] = _sampled(doc["sampled"])
    if doc.get("original"):
        doc["original"] = _result(doc["original"])
    of = [doc["original"].by_file] if doc.get("original") else []
    of += [doc["text_digests"]] if doc.get("text_digests") else []
    if any(set(other) != set(doc["by_file"]) for other in of):
        raise ValueError("texts differ within it")
    made = Result(**doc)
    _check_kinds(made)
    return made


def _check_kinds(made: Result) -> None:
    """Raise ValueError for what is no number, or no table, where there must be one."""
    for name, hint in get_type_hints(Result).items():
        value, kinds = (
            getattr(made, name),
            set(get_args(hint)) if isinstance(hint, UnionType) else {hint},
        )
        if value is None and type(None) in kinds:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if {int, float} & kinds and not number:
            raise ValueError(f"{name} is {value!r}, wanted a number")
        if any(get_origin(k) is Mapping for k in kinds) and not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}, wanted a table")


def _loss(doc: dict[str, Any]) -> Loss:
    tokens, nats = (tuple(doc.get(name, ())) for name in ("window_tokens", "window_nats"))
    found = Loss(**{**doc, "window_tokens": tokens, "window_nats": tuple(map(float, nats))})
    if len(tokens) != len(nats) or (tokens and sum(tokens) != found.tokens):
        raise ValueError("windows do not add up to their text")
    return found


def _sampled(doc: dict[str, Any]) -> Sampled:
    depths = tuple(Depth(**depth) for depth in doc["depths"])
    skip = doc.get("skipped")
    if skip:
        run = {int(i): share for i, share in skip["experts_run"].items()}
        skip = Skipped(**{**skip, "experts_run": run})
    return Sampled(**{**doc, "depths": depths, "skipped": skip})
