"""Intervals of what one model loses more than another, from the sums of their windows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from scipy.stats import ttest_1samp
from test_cli import refused, run
from test_report import folder

import moecule
from moecule.compare import compare
from moecule.data import all_windows, read_texts
from moecule.measure import MOST_WINDOWS, Loss, loss_of, window_losses
from moecule.paired import gap
from moecule.result import load_result
from moecule.session import tokenizer_of


def windowed(out: Path, nats: dict[str, list[float]], tokens: int = 10) -> None:
    """Give a folder's result these sums, by file and window."""
    file = out / "result.json"
    found = load_result(file)
    by_file = {
        name: Loss(
            sum(of) / (tokens * len(of)), tokens * len(of), 0.1, 0.9, 2.5,
            window_tokens=(tokens,) * len(of), window_nats=tuple(of),
        )
        for name, of in nats.items()
    }  # fmt: skip
    digests = dict.fromkeys(by_file, "fedcba9876543210")
    original = replace(found.original, by_file=by_file)
    loss = sum(of.loss_nats for of in by_file.values()) / len(by_file)
    changed = replace(
        found, by_file=by_file, text_digests=digests, loss_nats=loss, original=original
    )
    file.write_text(changed.dumps())
    assert load_result(file) == changed and f"[ {tokens}" in file.read_text()


def test_an_interval_is_that_of_the_windows_own_differences(tmp_path):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b")
    first, second = [20.0, 30.0, 25.0, 45.0], [21.0, 32.0, 26.5, 45.5]
    windowed(a, {"prose.txt": first})
    windowed(b, {"prose.txt": second})
    found = compare([a, b]).gaps[1]  # of windows that are as long: the paired t test
    change = [(y - x) / 10 for x, y in zip(first, second, strict=True)]
    wanted = ttest_1samp(change, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(sum(change) / 4)
    assert found.half == pytest.approx((wanted.high - wanted.low) / 2)
    code, out, err = run("compare", a, b)
    assert (
        code == 0 and str(found) in out and "\u00b1" in str(found) and "No interval" not in out
    ), err
    code, out, _ = run("compare", a, b, "--json")
    assert json.loads(out)[1]["to_the_first"] == {
        "mean": found.mean,
        "half": found.half,
        "why": None,
    }


def test_texts_count_once_each_in_an_interval_too():
    g = torch.Generator().manual_seed(0)
    widths, n = (5, 40), 4000
    # every text's windows drawn anew: as many intervals hold the truth as they say
    held = 0
    for _ in range(n):
        texts = [
            torch.randn(w, generator=g).mul(s) for w, s in zip(widths, (3.0, 1.0), strict=True)
        ]
        ours = {str(i): Loss(float(t.mean()), len(t), None, None, None, (1,) * len(t),
                             tuple(t.tolist())) for i, t in enumerate(texts)}  # fmt: skip
        theirs = {str(i): Loss(0.0, len(t), None, None, None, (1,) * len(t), (0.0,) * len(t))
                  for i, t in enumerate(texts)}  # fmt: skip
        found = gap(ours, theirs)
        assert found.half is not None
        held += abs(found.mean) <= found.half
    assert abs(held / n - 0.95) < 0.012


@pytest.mark.parametrize(
    ("ours", "said"),
    [(None, "no sums by window"), ({"prose.txt": [5.0]}, "is one window"),
     ({"prose.txt": [5.0, 6.0, 7.0]}, "put together differently")],
)  # fmt: skip
def test_without_an_interval_a_comparison_says_why(tmp_path, ours, said):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", loss=2.6)
    windowed(a, {"prose.txt": [4.0] if said == "is one window" else [4.0, 5.0]})
    if ours is not None:
        windowed(b, ours)
    code, out, err = run("compare", a, b)
    assert code == 0 and "\u00b1" not in out, err
    assert "No interval between a and b: " in out and said in out


def test_sums_that_do_not_add_up_are_damage(tmp_path):
    out = folder(tmp_path / "a")
    windowed(out, {"prose.txt": [4.0, 5.0]})
    file = out / "result.json"
    file.write_text(file.read_text().replace("[ 10, 10 ]", "[ 10, 11 ]"))
    assert "do not add up" in refused(tmp_path, "compare", out, out)


def test_evaluate_keeps_each_windows_sum_of_both_models(checkpoint, tmp_path):
    models = [checkpoint("qwen3_moe", tokenizer=True), checkpoint("mixtral", tokenizer=True)]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word {i} of it, {i * i}" for i in range(60)))
    before, after = moecule.evaluate(models[0], against=models[1], text=[text], length=32)
    windows = all_windows(tokenizer_of(models[0]), read_texts(text), 32)
    assert len(windows) > 8  # more than pass together
    for model, result in zip(models, (after, before), strict=True):
        found = result.by_file["text.txt"]
        assert found.window_tokens == (31,) * len(windows)
        wanted = 31 * window_losses(tiny.load(model), windows)
        torch.testing.assert_close(torch.tensor(found.window_nats), wanted, rtol=0, atol=2e-3)
        assert sum(found.window_nats) / found.tokens == pytest.approx(found.loss_nats, abs=1e-5)
    assert after.original == before


def test_many_windows_are_kept_in_runs():
    n = 3 * MOST_WINDOWS + 5
    sums = torch.rand(n, 4, dtype=torch.float64)
    found = loss_of(sums, torch.full((n,), 7), against=True)
    assert len(found.window_nats) == MOST_WINDOWS and set(found.window_tokens) == {21, 28}
    assert sum(found.window_nats) / (7 * n) == pytest.approx(found.loss_nats, abs=1e-6)
