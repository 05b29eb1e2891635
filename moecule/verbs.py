"""The verbs that make a checkpoint: calibrate, plan, apply, and compress, which is all three."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecule.apply import Applied, apply_plan
from moecule.ask import Ask as Ask  # the request is part of what the verbs take
from moecule.ask import decide
from moecule.batch import Batch, digest, n_tokens, shape_of
from moecule.budget import Inventory
from moecule.calibrate import collect, countable
from moecule.data import Sampling
from moecule.errors import CheckpointError, DataError, OutputError, RecipeError
from moecule.evidence import FILE as EVIDENCE
from moecule.folder import made_of, remains, write_config
from moecule.hf import Streamed
from moecule.inventory import take_inventory
from moecule.journal import Journal, Trail, making, sweep
from moecule.order import read_plan as read_plan  # the verb beside plan and apply
from moecule.order import save_plan
from moecule.plan import Keep, Plan
from moecule.recipe import Recipe, load_recipe, part_of
from moecule.session import (
    Compute,
    Progress,
    noting,
    open_checkpoint,
    silent,
    stream,
    ticker,
    trail_of,
)
from moecule.stats import COUNT, load_stats, save_layer, save_meta, stats_digest
from moecule.target import steered
from moecule.text import calibration_batches
from moecule.verify import keep_probe, probe_of, verify
from moecule.writer import Writer

AUTO = Compute()
DEFAULT_SAMPLING = Sampling()


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

    Does nothing where `out` holds the same already; goes on where a killed run of the same stopped.
    Raises OutputError where it holds other things.
    """
    chosen, out, ranks = _recipe(recipe), Path(out), compute.ranks
    done = ranks.share((out / "meta.json").is_file(), 0)
    streamed = stream(model, compute)
    batches = calibration_batches(streamed, data, chosen.data)
    needs = countable(streamed, chosen.counted(), chosen.needs())
    inputs = _inputs(streamed, batches, chosen.data) | {"statistics": sorted(s.name for s in needs)}
    if done:
        meta = _read_stats(out)[1]
        differing = [k for k, v in inputs.items() if meta.get(k) != v]
        if not differing:
            sweep(out, ranks, whole=True)
            return out
        raise OutputError(
            f"{out} holds statistics made with another {', '.join(differing)}; name another folder "
            "or remove it"
        )
    layers, backward = len(streamed.layers), any(s.backward for s in needs)
    steps = layers * (2 if backward else 1)
    tick = ticker(progress, "calibrate", steps, n_tokens(batches))
    mine = ranks.mine(batches)
    with making(out, {"verb": "calibrate", "processes": ranks.size, **inputs}, ranks) as journal:
        made = journal.made
        if not journal.is_written:
            trail = _trail(streamed, batches, compute, layers + 3 if backward else 3, journal)
            mend = "it is damaged, or needs a wider dtype (--dtype float32)"
            for layer, sums in collect(streamed, mine, needs, tick, trail):
                _check_finite({layer: sums}, str(model), mend)
                if ranks.is_first:
                    save_layer(sums, made, layer)
            if ranks.is_first:
                meta = inputs | {
                    "model": str(model),
                    "layers": [i for i in range(layers) if streamed.moe(i)],
                    "inventory": take_inventory(streamed).as_dict(),
                }
                save_meta(meta, made)
    return out


def _inputs(streamed: Streamed, batches: Sequence[Batch], sampling: Sampling) -> dict[str, Any]:
    """What the hidden states of a walk depend on."""
    n = len(batches)
    if n < streamed.ranks.size:
        raise DataError(
            f"{streamed.ranks.size} processes share {n} batches of {sampling.batch} windows; start "
            f"{n} processes at most, or give more text"
        )
    return {
        "digest": streamed.checkpoint.digest,
        "tokens": digest(batches),
        "window": shape_of(batches),
        "batch": sampling.batch,
        "dtype": str(streamed.model.dtype).removeprefix("torch."),
    }


def _trail(
    streamed: Streamed, batches: Sequence[Batch], compute: Compute, copies: int, journal: Journal
) -> Trail:
    trail = trail_of(streamed, n_tokens(batches), compute, copies, journal.folder)
    return noting(trail, journal)


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
    sums, meta = load_stats(folder)
    try:
        inventory = Inventory.from_dict(meta["inventory"])
        whole = all(set(of) == {*meta["statistics"]} for of in sums.values())
        if not all(isinstance(meta[key], str) for key in ("model", "digest")):
            raise ValueError("model and digest are no text")
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise DataError(
            f"{folder} is damaged, or of another release of moecule ({e!r}); remove it and calibrate again"
        ) from e
    counts = {i: len(of[COUNT.name]) for i, of in sums.items() if COUNT.name in of}
    if not whole or {i: e.n for i, e in inventory.experts.items()} != counts:
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
    chosen = ask.steered(_recipe(recipe))
    sums, meta, inventory = _read_stats(Path(stats))
    ask.check(chosen, inventory)
    lacking = sorted({s.name for s in chosen.needs()} - set(meta["statistics"]))
    if lacking:
        raise RecipeError(
            f"{stats} has no {', '.join(lacking)}, which recipe {chosen.name} reads; "
            f"calibrate again with --recipe {chosen.name}"
        )
    made = replace(
        decide(chosen, ask, sums, inventory),
        model=meta["model"],
        digest=meta["digest"],
        encode=chosen.encode.as_dict(),
        made_by={
            "recipe": chosen.name,
            **({"score": chosen.score.as_dict()} if chosen.score else {}),
            **({"choose": chosen.choose.as_dict()} if chosen.choose else {}),
            **({"channels": chosen.channels.as_dict()} if chosen.channels else {}),
            **chosen.joining(),
            **({"sparsify": chosen.sparsify.as_dict()} if chosen.sparsify else {}),
            **({"mask": chosen.mask.as_dict()} if chosen.mask else {}),
            "group": chosen.group,
            "allocate": chosen.allocate.as_dict(),
            "encode": chosen.encode.as_dict(),
            "rest": {part: str(keep) for part, keep in chosen.rest.items()},
            "skip": chosen.skip.as_dict() if chosen.skip else None,
            "budget": ask.text(chosen),
            **_steering(_recipe(recipe), ask),
            "stats": stats_digest(Path(stats)),
        },
    )
    _warn_of_few(made, sums)
    if out is not None:
        save_plan(made, Path(out))
    return made


def _steering(recipe: Recipe, ask: Ask) -> dict[str, Any]:
    """For the plan: the target, and the choices that the recipe would not have made itself."""
    if ask.target is None:
        return {}
    return {"target": ask.target, "for_target": steered(recipe, ask.target)[1]}


FEW = 32  # tokens; means over fewer say little


def _warn_of_few(plan: Plan, sums: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Where experts or channels were dropped: how many of those that stay were chosen on little."""
    few = [
        e
        for i, fates in plan.layers.items()
        for e, fate in enumerate(fates)
        if isinstance(fate, Keep) and sums[i][COUNT.name][e] < FEW
    ]
    if (plan.dropped or plan.narrowed) and few:
        warnings.warn(
            f"{len(few)} of the experts that stay saw fewer than {FEW} tokens, so which go was decided "
            "on little; calibrate on more text (--samples)",
            stacklevel=3,
        )


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

    Does nothing where `out` holds just that already; goes on where a killed run of the same stopped.
    Raises PlanError where the plan does not fit the model, OutputError where `out` holds other
    things, VerifyError where the written checkpoint does not compute what it should.
    """
    out, ranks = Path(out), compute.ranks
    chosen = plan if isinstance(plan, Plan) else read_plan(plan)
    encode = part_of("plan, encode", chosen.encode, "encode")
    source = open_checkpoint(model).path
    there = ranks.share(made_of(out, chosen) if ranks.is_first else None, 0)
    if ranks.is_first:
        sweep(out, ranks, whole=False)
    streamed = stream(model, compute)
    batches = calibration_batches(streamed, data, sampling)
    inputs = {"plan": chosen.code_digest, **_inputs(streamed, batches, sampling)}
    if there == inputs:
        sweep(out, ranks, whole=True)
        return out
    request = {"verb": "apply", "processes": ranks.size, **inputs}
    tick = ticker(progress, "apply", len(streamed.layers), n_tokens(batches))
    with making(out, request, ranks, remains(out, source)) as journal:
        made = journal.made
        if not journal.is_written:
            writer, mine = Writer(made), ranks.mine(batches)
            trail = _trail(streamed, batches, compute, 3, journal)
            # without a journal all layers are done anew, and so is what was kept of them
            probe = journal.folder / "probe"
            probed = probe_of(batches[0], streamed.family.takes)
            keep = partial(keep_probe, probe=probe, n=probed["input_ids"].shape[1])
            done = apply_plan(streamed, chosen, encode, mine, writer, tick, trail, keep)
            if ranks.is_first:
                writer.close()
                write_config(made, streamed.checkpoint, streamed.family, chosen, done, inputs)
                check = ticker(progress, "check", 1)
                _verify(streamed, done, probed, made, probe)
                check()
        if ranks.is_first:
            for file in ("result.json", EVIDENCE):  # of what lay there before
                (out / file).unlink(missing_ok=True)
    return out


def _verify(
    streamed: Streamed, done: Applied, probed: Mapping[str, Tensor], folder: Path, probe: Path
) -> None:
    """Compare what `folder` computes, opened afresh, with the walk."""
    n = probed["input_ids"].shape[1]
    assert done.last is not None  # the walk has come to its end
    with torch.no_grad():
        logits = streamed.logits(done.last[0][:1, :n], probed)
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            f"{streamed.checkpoint.path}, compressed, gives NaN or Inf on this text; it is "
            "damaged, or needs a wider dtype (--dtype float32) or more bits"
        )
    if streamed.device.type == "cuda":
        torch.cuda.empty_cache()  # the other process needs room on the same device
    verify(folder, probed, logits, probe, streamed.model.dtype, streamed.device)
