"""One case of an experiment: a plan applied, written, opened again and measured on windows of text."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Int
from torch import Tensor

from moecule.apply import apply_plan
from moecule.batch import Batch
from moecule.calibrate import collect, countable
from moecule.data import all_windows, read_text, read_texts
from moecule.folder import write_config
from moecule.hf import Streamed
from moecule.inventory import take_inventory
from moecule.plan import Plan
from moecule.recipe import Recipe, part_of
from moecule.session import Compute, open_checkpoint, tokenizer_of
from moecule.stats import save_layer, save_meta
from moecule.writer import Writer

FLOAT32 = Compute(dtype="float32")
Losses = Mapping[str, Sequence[float]]  # by file: of each window, nats a token


def calibrated(
    streamed: Streamed, batches: Sequence[Batch], recipes: Sequence[Recipe], folder: Path
) -> None:
    """Statistics of all the recipes in one folder, as `moecule.calibrate` writes them for one."""
    wanted = tuple(dict.fromkeys(s for recipe in recipes for s in recipe.counted()))
    needs = countable(streamed, wanted, wanted)
    for layer, sums in collect(streamed, batches, needs):
        save_layer(sums, folder, layer)
    meta = {
        "model": str(streamed.checkpoint.path),
        "digest": streamed.checkpoint.digest,
        "statistics": sorted(s.name for s in needs),
        "inventory": take_inventory(streamed).as_dict(),
        "layers": [i for i in range(len(streamed.layers)) if streamed.moe(i)],
    }
    save_meta(meta, folder)


@contextmanager
def written(streamed: Streamed, plan: Plan, batches: Sequence[Batch]) -> Iterator[Path]:
    """A folder as `moecule.apply` writes it, but for the check in a fresh process; gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, encode = Path(scratch), part_of("encode", plan.encode, "encode")
        writer = Writer(folder)
        done = apply_plan(streamed, plan, encode, batches, writer)
        writer.close()
        write_config(folder, streamed.checkpoint, streamed.family, plan, done)
        yield folder


def windows_of(
    model: str | Path, texts: Sequence[str], length: int, n: int
) -> dict[str, Int[Tensor, "_windows length"]]:
    """The first n windows of each text, by the file's name."""
    tokenizer = tokenizer_of(open_checkpoint(model).path)
    return {Path(t).stem: all_windows(tokenizer, read_texts(t), length)[:n] for t in texts}


def by_domain(file: str | Path) -> dict[str, list[str]]:
    """{domain: its documents} of lines [domain, text]."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in read_text(file).split("\n"):
        if line.strip():
            domain, text = json.loads(line)
            found[domain].append(text)
    return dict(sorted(found.items()))


def added(losses: Losses, original: Losses) -> tuple[float, float]:
    """(mean of the files' mean differences in nats a token, half width of its 95 % interval)"""
    d = [np.subtract(losses[f], original[f]) for f in losses]
    spread = np.sqrt(sum(x.var(ddof=1) / len(x) for x in d)) / len(d)
    return float(np.mean([x.mean() for x in d])), float(1.96 * spread)
