"""A tiny model of every family that transformers' experts interface serves can be made and kept."""

from __future__ import annotations

import every
import pytest
import tiny
import torch


def test_every_family_that_transformers_serves_has_a_tiny_model_or_is_named_as_untried():
    assert set(every.served()) - set(every.MODELS) == set()


@pytest.mark.parametrize("name", every.known())
def test_a_tiny_model_runs_and_is_the_same_after_saving_and_loading(name, tmp_path):
    model, (batch,) = every.make(name), tiny.tokens()
    want = every.logits(model, batch)
    assert torch.isfinite(want).all() and want.std() > 0
    model.save_pretrained(tmp_path)
    assert torch.equal(every.logits(type(model).from_pretrained(tmp_path), batch), want)
