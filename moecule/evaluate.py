"""evaluate: what a compressed model lost, what it weighs and how fast it is, as a Result.

Over several files the loss is the mean of the files' losses, so that a long file does not drown
a short one. `measure.py` has the conventions.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from moecule.data import (
    Sampling,
    all_windows,
    check_tokens,
    held_out_windows,
    read_texts,
    window_length,
)
from moecule.errors import CheckpointError, DataError, PlanError
from moecule.inventory import weigh
from moecule.measure import Loss, device_name, speed, text_loss
from moecule.online import experts_run
from moecule.plan import Plan
from moecule.session import (
    ASSETS,
    Compute,
    Progress,
    load,
    open_checkpoint,
    silent,
    ticker,
    tokenizer_of,
)

MOST_NATS = 700.0  # exp() of more is no float, and no model that computes is so bad
HELD_OUT = 32  # windows, where no text to evaluate on was given


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
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    device: str
    dtype: str
    plan_digest: str | None = None
    peak_memory_bytes: Mapping[str, int] = field(
        default_factory=dict
    )  # host and device, of compress
    seconds: Mapping[str, float] = field(default_factory=dict)  # by verb

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: Sequence[str | Path] = (),
    length: int = 0,
    data: str | Path | None = None,
    sampling: Sampling | None = None,
    skip: bool = False,
    compute: Compute | None = None,
    progress: Progress = silent,
) -> tuple[Result | None, Result]:
    """(the original's result if `against` names it, the model's), over the same windows.

    `text`: files to evaluate on, each whole. Without any: windows of the calibration text `data`
    that calibration did not see, or without that the package's own evaluation text.
    Raises DataError for text that is too short, CheckpointError for an original of another
    vocabulary, and what opening the models raises.
    """
    compute = compute or Compute()
    checkpoint = open_checkpoint(model)
    digest = _plan_digest(checkpoint.path)
    loaded = load(model, compute, skip=skip)
    original = None if against is None else load(against, compute)
    _check_vocabularies(loaded, original, against)
    windows = evaluation_windows(
        loaded.config, checkpoint.path, text, length, data, sampling or Sampling()
    )
    steps = sum(-(-len(w) // 8) for w in windows.values())
    tick = ticker(progress, "evaluate", steps)
    start = time.perf_counter()
    by_file = {name: text_loss(loaded, w, original, tick=tick) for name, w in windows.items()}
    seconds = {"evaluate": round(time.perf_counter() - start, 2)}
    names = (str(model), None if against is None else str(against))
    after = _result(loaded, weigh(checkpoint), by_file, windows, names, seconds, digest)
    if against is None:
        return None, after
    theirs = {
        name: Loss(r.original_loss_nats or 0.0, r.tokens, 0.0, 1.0, r.original_loss_nats)
        for name, r in by_file.items()
    }
    sizes = weigh(open_checkpoint(against))
    return _result(original, sizes, theirs, windows, (str(against), None), {}, None), after


def _plan_digest(path: Path) -> str | None:
    file = path / "plan.yaml"
    try:
        return Plan.loads(file.read_text()).code_digest if file.is_file() else None
    except UnicodeDecodeError as e:
        raise PlanError(f"{file} is no text ({e}); compress again") from e


def _check_vocabularies(model: Any, original: Any, against: Any) -> None:
    sizes = [m.config.get_text_config().vocab_size for m in (model, original or model)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{against} knows {sizes[1]} tokens and the model {sizes[0]}; give its own original"
        )


def evaluation_windows(
    config: Any,
    path: Path,
    text: Sequence[str | Path],
    length: int,
    data: str | Path | None,
    sampling: Sampling,
) -> dict[str, Int[Tensor, "N S"]]:
    """What `evaluate` measures on, by the file's name: `config` and `path` are of the model.

    Raises DataError for text that cannot be read or gives not one window.
    """
    tokenizer = tokenizer_of(path)
    size = window_length(config, length or sampling.length)
    if data is not None and not text:
        held = held_out_windows(tokenizer, read_texts(data), sampling, size, HELD_OUT)
        windows = {f"held out of {Path(data).name}": held}
    else:
        files = text or sorted((ASSETS / "text" / "eval").glob("*.txt"))
        names = [Path(t).name for t in files]
        unique = names if len(set(names)) == len(names) else [str(t) for t in files]
        texts = zip(unique, files, strict=True)
        windows = {name: all_windows(tokenizer, read_texts(t), size) for name, t in texts}
    for found in windows.values():
        check_tokens(found, config)
    return windows


def _result(
    model: Any,
    sizes: Mapping[str, Any],
    by_file: Mapping[str, Loss],
    windows: Mapping[str, Int[Tensor, "N S"]],
    names: tuple[str, str | None],
    seconds: Mapping[str, float],
    digest: str | None,
) -> Result:
    means = mean_loss(by_file)
    loss = means["loss_nats"]
    assert loss is not None  # every file has a loss
    if loss > MOST_NATS:
        raise DataError(f"a loss of {loss:.3g} nats a token; the checkpoint is damaged")
    some = next(iter(windows.values()))
    run = experts_run(model)
    prefill, decode = speed(model, some[:1])
    return Result(
        model=names[0],
        against=names[1],
        loss_nats=loss,
        perplexity=math.exp(loss),
        kl_nats=means["kl_nats"],
        top1_agreement=means["top1_agreement"],
        original_loss_nats=means["original_loss_nats"],
        by_file=by_file,
        window=some.shape[1],
        memory_bytes=sum(
            t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
        ),
        experts_run=run,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        seconds=seconds,
        plan_digest=digest,
        **sizes,
    )


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
        _row("loss, nats a token", before.loss_nats, after.loss_nats, "{:.4f}"),
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
    return rows


def _row(
    what: str, a: float, b: float, form: str, *, ratio: bool = False
) -> tuple[str, str, str, str]:
    change = f"x {b / a:.3f}" if ratio else f"{b - a:+.4f}" if "4" in form else f"{b - a:+.2f}"
    return what, form.format(a), form.format(b), change


def load_result(path: Path) -> Result:
    """The result that was written. Raises DataError where it is damaged."""
    try:
        doc = json.loads(path.read_text())
        doc["by_file"] = {k: Loss(**v) for k, v in doc["by_file"].items()}
        return Result(**doc)
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise DataError(f"{path} is no result of moecule evaluate ({e})") from e
