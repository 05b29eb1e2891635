"""A tiny model of every family that transformers' experts interface serves can be made and kept."""

from __future__ import annotations

import every
import pytest
import tiny
import torch

from moecule.catalogue import served_by_transformers
from moecule.families import REFUSED


def test_every_family_that_transformers_serves_has_a_tiny_model():
    untried = set(served_by_transformers()) - set(every.MODELS)
    assert untried == {"qwen3_omni_moe"}  # two models in one; every.MODELS has the thinker


@pytest.mark.parametrize("name", [n for n in every.known() if n not in REFUSED])
def test_a_tiny_model_runs_and_is_the_same_after_saving_and_loading(name, checkpoint):
    model, (batch,) = every.make(name), tiny.tokens()
    want = every.logits(model, batch)
    assert torch.isfinite(want).all() and want.std() > 0
    again = type(model).from_pretrained(checkpoint(name))
    assert torch.equal(every.logits(again, batch), want)
