"""What is held does not grow with layers; experiments/memory measures it."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from statistics import median

import every
import pytest
import tiny
import torch

from moecule import walk
from moecule.inventory import take_inventory
from moecule.journal import Trail
from moecule.needs import needs_of, work_of
from moecule.recipe import load_recipe
from moecule.record import record
from moecule.session import Compute
from moecule.states import give_back


@pytest.fixture
def deep(tmp_path):
    """A model of 12 layers."""
    tiny.save("qwen3_moe", tmp_path / "model", num_hidden_layers=12)
    return tmp_path / "model"


def tensors() -> list[torch.Tensor]:
    """All that there are in this process."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]


def alive() -> int:
    """Bytes of all tensors that hold any."""
    held = [t.untyped_storage() for t in tensors() if not t.is_meta]
    return sum({s.data_ptr(): s.nbytes() for s in held}.values())


def test_states_on_disk_keep_neither_threads_nor_tensors(deep, tmp_path, monkeypatch):
    others = tensors()  # what tests before left: kept, so that none of it goes meanwhile
    trimmed: list[None] = []
    monkeypatch.setattr(walk, "give_back", lambda: trimmed.append(None))
    streamed, batches = tiny.stream(deep), tiny.tokens(2)
    up = walk.walk(streamed, batches, trail=Trail("disk", tmp_path / "hidden"), keep=True)
    threads, held = [], []
    for step in up:
        step.run()
        threads.append(threading.active_count())
        held.append(alive())
    assert len(held) == 12 and threads[1:] == threads[1:2] * 11
    # what is being written comes and goes; the states of five layers would be 46 kB, their weights more
    assert median(held[6:11]) - median(held[1:6]) < 30_000
    assert len(trimmed) == 12
    del others


def test_layers_are_called_alike_for_all_batches(deep):
    model = tiny.stream(deep).model
    _, first = record(model, tiny.tokens()[0])
    _, second = record(model, tiny.tokens(seed=1)[0], first)
    _, longer = record(model, tiny.tokens(shape=(2, 24))[0], first)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert not any(a is b for a, b in zip(first, longer, strict=True))


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_freed_pieces_are_given_back():
    pieces = [torch.ones(16000) for _ in range(2000)]  # 64 kB: of the heap, not mapped one by one
    kept = pieces[::20]
    before = anonymous()
    del pieces
    held = anonymous()
    give_back()
    assert before - anonymous() > 100e6 and held > anonymous() and len(kept) == 100


def test_streams_of_hidden_states_are_foreseen(tmp_path):
    every.make("qwen4_exp").save_pretrained(tmp_path)
    streamed = tiny.stream(tmp_path)
    recipe = load_recipe("uniform", {"data.samples": 8, "data.length": 16})
    work = work_of(streamed, take_inventory(streamed), recipe)
    (hidden, *_) = walk.finish(walk.walk(streamed, tiny.tokens(shape=(8, 16)))).last
    assert work.states == hidden.nbytes
    # of all layers, where the walk comes down again
    more = replace(work, layers=work.layers + 10, backward=True)
    few, many = (needs_of(w, 10**6, Compute("cpu", states="disk")) for w in (work, more))
    assert many.host_bytes >= few.host_bytes and many.states_bytes > 10 * work.states
