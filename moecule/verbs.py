"""The verbs that make a checkpoint: calibrate, plan, apply, and compress, which is all three."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moecule.apply import apply_plan
from moecule.budget import Inventory, parse_size, within
from moecule.calibrate import collect
from moecule.checkpoint import Writer, check_out, move_into
from moecule.data import Sampling, batches, read_texts, sample_windows, tokens_digest, window_length
from moecule.errors import OutputError, PlanError, RecipeError
from moecule.folder import PROBE_TOKENS, verify, write_config
from moecule.hf import Streamed
from moecule.inventory import take_inventory
from moecule.method import load_method
from moecule.plan import Keep, Plan, Skip
from moecule.recipe import Recipe, load_recipe, part_of
from moecule.session import ASSETS, Compute, Progress, silent, stream, ticker, tokenizer_of
from moecule.stats import COUNT, load_stats, save_stats, stats_digest

AUTO = Compute()
DEFAULT_SAMPLING = Sampling()


def calibration_windows(
    streamed: Streamed, data: str | Path | None, sampling: Sampling
) -> Int[Tensor, "N S"]:
    """Of the user's text, or of the text that comes with the package."""
    length = window_length(streamed.model.config, sampling.length)
    texts = read_texts(data or ASSETS / "text" / "calibration.jsonl")
    return sample_windows(tokenizer_of(streamed.checkpoint.path), texts, sampling, length)


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
    if out.exists() and any(out.iterdir()):
        _, meta = load_stats(out)
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
    meta = inputs | {
        "model": str(model),
        "layers": sorted(sums),
        "inventory": take_inventory(streamed).as_dict(),
    }
    partial = _partial(out)
    save_stats(sums, partial, meta)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out


def _recipe(recipe: str | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _partial(out: Path) -> Path:
    """A folder beside `out` to write in; what an earlier run left there is gone."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


@dataclass(frozen=True)
class Ask:
    """How small: mean code bits of the experts, or true bytes; one of them, or the recipe's bits."""

    bits: float | None = None
    size: str | int | None = None  # of the whole checkpoint
    fit: str | int | None = None  # of the checkpoint and a KV cache of `context` tokens
    context: int = 4096

    def size_bytes(self, inventory: Inventory) -> int | None:
        """The bytes to keep within, if the user gave any. Raises RecipeError for two wishes at once."""
        if sum(x is not None for x in (self.bits, self.size, self.fit)) > 1:
            raise RecipeError("give one of bits, size and fit")
        if self.size is not None:
            return parse_size(self.size)
        if self.fit is not None:
            cache = inventory.kv_bytes_per_token * min(self.context, inventory.max_position)
            return parse_size(self.fit) - cache
        return None


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
    sums, meta = load_stats(Path(stats))
    inventory = Inventory.from_dict(meta["inventory"])
    lacking = sorted({s.name for s in chosen.needs()} - set(meta["statistics"]))
    if lacking:
        raise RecipeError(
            f"{stats} has no {', '.join(lacking)}, which recipe {chosen.name} reads; "
            f"calibrate again with --recipe {chosen.name}"
        )
    method = load_method(chosen.allocate.method, "allocate")
    assert method.allocate is not None  # load_method saw to it
    allocate = method.allocate
    made_by = {
        "recipe": chosen.name,
        "allocate": chosen.allocate.as_dict(),
        "skip": chosen.skip.as_dict() if chosen.skip else None,
        "budget": _wish(ask, chosen),
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
        _write_text(Path(out), made.dumps())
    return made


def _wish(ask: Ask, recipe: Recipe) -> str:
    if ask.size is not None:
        return f"size {ask.size}"
    if ask.fit is not None:
        return f"fit {ask.fit}, {ask.context} tokens"
    return f"{ask.bits if ask.bits is not None else recipe.bits:g} bits"


def _skip(recipe: Recipe, sums: Any) -> Skip | None:
    if recipe.skip is None:
        return None
    method = load_method(recipe.skip.method, "thresholds")
    assert method.thresholds is not None  # load_method saw to it
    thresholds, protect = method.thresholds(sums, recipe.skip.options)
    return Skip(thresholds, protect)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.rename(path)


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
    check_out(out, {"stats", "plan.yaml"})
    chosen = plan if isinstance(plan, Plan) else read_plan(plan)
    encode = part_of("plan, encode", chosen.encode, "encode")
    streamed = stream(model, compute)
    windows = calibration_windows(streamed, data, sampling)
    tick = ticker(progress, "apply", len(streamed.base.layers))
    partial = _partial(out)
    writer = Writer(partial)
    try:
        done = apply_plan(streamed, chosen, encode, batches(windows, sampling.batch), writer, tick)
        writer.close()
        write_config(partial, streamed.checkpoint, streamed.family, chosen, done)
        n = min(PROBE_TOKENS, windows.shape[1])
        with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
            logits = streamed.logits(done.hidden[0][:1, :n])
            verify(
                partial,
                windows[:1, :n],
                logits,
                streamed.model.dtype,
                streamed.device,
                Path(scratch),
            )
        move_into(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
