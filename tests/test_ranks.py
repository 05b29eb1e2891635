"""Two processes do what one does: the sums are the same but for their order, the checkpoint is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from moecule.checkpoint import Checkpoint
from moecule.ranks import Ranks
from moecule.result import load_result
from moecule.stats import load_stats

TEXT = "The cat sat on the mat, and 7 more came by; all of them were fed.\n"
SMALL = ("--samples", "12", "--length", "24", "--set", "data.batch=3")


def test_the_runs_of_all_processes_are_the_whole_in_order():
    items = list(range(11))
    for size in (1, 2, 3, 11):
        parts = [Ranks(rank, size).mine(items) for rank in range(size)]
        assert sum(parts, []) == items
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def compress(model: Path, out: Path, processes: int, *ask: str) -> None:
    """In fresh processes, as a user starts them; gloo, on the CPU."""
    text = out.parent / "text.txt"
    text.write_text(TEXT * 60)
    verb = ["compress", str(model), "-o", str(out), *ask, *SMALL]
    verb += ["--set", "group=16", "--data", str(text), "--text", str(text), "--device", "cpu"]
    ended = tiny.start(processes, "-m", "moecule", *verb)
    assert ended.returncode == 0, ended.stderr


BITS, CHANNELS = ("--bits", "2.5"), ("--recipe", "camera_p", "--drop", "25%")


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("mixtral", BITS),
        pytest.param("deepseek_v3", BITS, marks=pytest.mark.slow),
        pytest.param(
            "mixtral", CHANNELS, marks=pytest.mark.slow
        ),  # the greatest of all, not the sum
    ],
)
def test_two_processes_write_what_one_writes(name, ask, checkpoint, tmp_path):
    model = checkpoint(name, tokenizer=True)
    for n in (1, 2):
        compress(model, tmp_path / str(n), n, *ask)
    (one, meta), (two, meta_two) = (load_stats(tmp_path / n / "stats") for n in "12")
    assert meta | {"sums": None} == meta_two | {"sums": None}  # the digest knows their last bits
    for layer, sums in one.items():
        for key, value in sums.items():
            torch.testing.assert_close(two[layer][key], value, rtol=1e-12, atol=0)
    checkpoints = [Checkpoint.open(tmp_path / n) for n in "12"]
    a, b = (c.read(list(c.tensors)) for c in checkpoints)
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    texts = [load_result(tmp_path / n / "result.json").by_file["text.txt"] for n in "12"]
    assert texts[0].window_tokens == texts[1].window_tokens and len(texts[0].window_nats) > 8
    assert texts[0].window_nats == pytest.approx(texts[1].window_nats, abs=2e-4)
    left = [p.name for p in tmp_path.rglob(".*") if p.name.startswith(".")]
    assert left == []
