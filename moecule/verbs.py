"""The verbs that make a checkpoint: calibrate, plan, apply, and compress, which is all three."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moecule.apply import Applied, apply_plan
from moecule.budget import Inventory, within
from moecule.calibrate import collect
from moecule.checkpoint import Writer, check_out, move_into
from moecule.data import (
    Sampling,
    batches,
    check_tokens,
    read_texts,
    sample_windows,
    tokens_digest,
    window_length,
)
from moecule.errors import CheckpointError, DataError, OutputError, PlanError, RecipeError
from moecule.folder import PROBE_TOKENS, partial_of, remains, verify, write_config, write_text
from moecule.hf import Streamed
from moecule.inventory import take_inventory
from moecule.method import load_method
from moecule.plan import Keep, Plan, Skip
from moecule.recipe import Ask as Ask  # the request is part of what the verbs take
from moecule.recipe import Recipe, load_recipe, part_of
from moecule.session import (
    ASSETS,
    Compute,
    Progress,
    open_checkpoint,
    silent,
    stream,
    ticker,
    tokenizer_of,
)
from moecule.stats import COUNT, load_stats, save_stats, stats_digest

AUTO = Compute()
DEFAULT_SAMPLING = Sampling()


def calibration_windows(
    streamed: Streamed, data: str | Path | None, sampling: Sampling
) -> Int[Tensor, "N S"]:
    """Of the user's text, or of the text that comes with the package."""
    length = window_length(streamed.model.config, sampling.length)
    texts = read_texts(data or ASSETS / "text" / "calibration.jsonl")
    tokenizer = tokenizer_of(streamed.checkpoint.path)
    windows = sample_windows(tokenizer, texts, sampling, length)
    check_tokens(windows, streamed.model.config)
    return windows


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "mc",
    data: str | Path | None = None,
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> Path:
    """Count over the calibration text what the recipe's methods read, into the folder `out`.

    Does nothing where `out` holds the same already. Raises OutputError where it holds other things.
    """
    chosen, out = _recipe(recipe), Path(out)
    done = (out / "meta.json").is_file()
    if not done:
        check_out(out, set())
    streamed = stream(model, compute)
    windows = calibration_windows(streamed, data, chosen.data)
    needs = (COUNT, *(s for s in chosen.needs() if s != COUNT))
    inputs = {
        "digest": streamed.checkpoint.digest,
        "tokens": tokens_digest(windows),
        "window": [*windows.shape],
        "batch": chosen.data.batch,
        "dtype": str(streamed.model.dtype).removeprefix("torch."),
        "statistics": sorted(s.name for s in needs),
    }
    if done:
        meta = _read_stats(out)[1]
        differing = [k for k, v in inputs.items() if meta.get(k) != v]
        if not differing:
            return out
        raise OutputError(
            f"{out} holds statistics made with another {', '.join(differing)}; name another folder "
            "or remove it"
        )
    layers = len(streamed.base.layers)
    steps = layers * (2 if any(s.backward for s in needs) else 1)
    tick = ticker(progress, "calibrate", steps)
    sums = collect(streamed, batches(windows, chosen.data.batch), needs, tick)
    _check_finite(sums, str(model), "it is damaged, or needs a wider dtype (--dtype float32)")
    meta = inputs | {
        "model": str(model),
        "layers": sorted(sums),
        "inventory": take_inventory(streamed).as_dict(),
    }
    with partial_of(out) as partial:
        save_stats(sums, partial, meta)
        if out.is_dir():  # empty; it stays, for someone may stand in it
            move_into(partial, out)
        else:
            partial.replace(out)
    return out


def _recipe(recipe: str | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _check_finite(sums: Mapping[int, Mapping[str, Tensor]], where: str, mend: str) -> None:
    """Raise DataError: a layer's output may be finite where what follows from it is not."""
    for layer, of in sums.items():
        for name, value in of.items():
            if not torch.isfinite(value).all():
                raise DataError(f"{where}: {name} of layer {layer} is NaN or Inf; {mend}")


def _read_stats(folder: Path) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any], Inventory]:
    """(stats, meta, the model's inventory). Raises DataError where the folder is damaged."""
    try:
        sums, meta = load_stats(folder)
        inventory = Inventory.from_dict(meta["inventory"])
        whole = all(set(of) == {*meta["statistics"]} for of in sums.values())
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as e:
        raise DataError(f"{folder} is damaged ({e!r}); remove it and calibrate again") from e
    if not whole or set(inventory.experts) != set(sums):
        raise DataError(f"{folder} lacks statistics of some layer; remove it and calibrate again")
    _check_finite(sums, str(folder), "remove it and calibrate again")
    return sums, meta, inventory


NO_WISH = Ask()


def plan(
    stats: str | Path,
    out: str | Path | None = None,
    *,
    recipe: str | Recipe = "mc",
    ask: Ask = NO_WISH,
) -> Plan:
    """Decide what becomes of every expert, from statistics alone; write it to `out` if given.

    Raises RecipeError for a budget that cannot be met or statistics that lack what is read.
    """
    chosen = _recipe(recipe)
    sums, meta, inventory = _read_stats(Path(stats))
    lacking = sorted({s.name for s in chosen.needs()} - set(meta["statistics"]))
    if lacking:
        raise RecipeError(
            f"{stats} has no {', '.join(lacking)}, which recipe {chosen.name} reads; "
            f"calibrate again with --recipe {chosen.name}"
        )
    ask.check(chosen, inventory)
    method = load_method(chosen.allocate.method, "allocate")
    assert method.allocate is not None  # load_method saw to it
    allocate = method.allocate
    made_by = {
        "recipe": chosen.name,
        "allocate": chosen.allocate.as_dict(),
        "encode": chosen.encode.as_dict(),
        "rest": {part: str(keep) for part, keep in chosen.rest.items()},
        "skip": chosen.skip.as_dict() if chosen.skip else None,
        "budget": ask.text(chosen),
        "stats": stats_digest(Path(stats)),
    }
    skip = _skip(chosen, sums)

    def make(bits: float) -> Plan:
        widths = allocate(sums, bits, chosen.allocate.options)
        return Plan(
            model=meta["model"],
            digest=meta["digest"],
            layers={i: tuple(Keep(b, chosen.group) for b in w) for i, w in sorted(widths.items())},
            rest=chosen.rest,
            encode=chosen.encode.as_dict(),
            skip=skip,
            made_by=made_by,
        )

    size = ask.size_bytes(inventory)
    made = (
        make(ask.bits if ask.bits is not None else chosen.bits)
        if size is None
        else within(make, inventory, size, whole=method.whole_bits)
    )
    if out is not None:
        write_text(Path(out), made.dumps())
    return made


def _skip(recipe: Recipe, sums: Any) -> Skip | None:
    if recipe.skip is None:
        return None
    method = load_method(recipe.skip.method, "thresholds")
    assert method.thresholds is not None  # load_method saw to it
    thresholds, protect = method.thresholds(sums, recipe.skip.options)
    return Skip(thresholds, protect)


def read_plan(path: str | Path) -> Plan:
    """A plan from its file. Raises PlanError where it cannot be read."""
    try:
        return Plan.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(f"{path} cannot be read as a plan: {e}") from e


def apply(
    model: str | Path,
    plan: str | Path | Plan,
    out: str | Path,
    *,
    data: str | Path | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    compute: Compute = AUTO,
    progress: Progress = silent,
) -> Path:
    """Carry a plan out: a checkpoint in `out`, opened afresh and compared before it is put in place.

    Raises PlanError where the plan does not fit the model, OutputError where `out` holds other
    things, VerifyError where the written checkpoint does not compute what it should.
    """
    out = Path(out)
    chosen = plan if isinstance(plan, Plan) else read_plan(plan)
    encode = part_of("plan, encode", chosen.encode, "encode")
    check_out(out, remains(out, open_checkpoint(model).path))
    streamed = stream(model, compute)
    windows = calibration_windows(streamed, data, sampling)
    tick = ticker(progress, "apply", len(streamed.base.layers))
    with partial_of(out) as partial:
        writer = Writer(partial)
        done = apply_plan(streamed, chosen, encode, batches(windows, sampling.batch), writer, tick)
        writer.close()
        write_config(partial, streamed.checkpoint, streamed.family, chosen, done)
        _verify(streamed, done, windows, partial)
        (out / "result.json").unlink(missing_ok=True)  # of what lay there before
        move_into(partial, out)
    return out


def _verify(streamed: Streamed, done: Applied, windows: Int[Tensor, "N S"], folder: Path) -> None:
    """Compare what `folder` computes, opened afresh, with the logits of the walk."""
    n = min(PROBE_TOKENS, windows.shape[1])
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        logits = streamed.logits(done.hidden[0][:1, :n])
        if not torch.isfinite(logits).all():
            raise CheckpointError(
                f"{streamed.checkpoint.path}, compressed, gives NaN or Inf on this text; it is "
                "damaged, or needs a wider dtype (--dtype float32) or more bits"
            )
        verify(
            folder, windows[:1, :n], logits, streamed.model.dtype, streamed.device, Path(scratch)
        )
