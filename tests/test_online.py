"""Skipping in a loaded, compressed model: off it is not there, on it does what the rule says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoConfig

from moecule import experts_run, runtime, set_skip
from moecule.errors import PlanError
from moecule.family import load_family
from moecule.methods import odp
from moecule.moe import find_layers, find_moe
from moecule.plan import Keep, Skip

# sinks and sliding windows; latent attention; coefficients that are not scaled to a sum
FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe"]
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def compressed(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """compressed(name, limit, protect): with that threshold in every MoE layer."""
    made: dict[tuple[str, float, float], Path] = {}

    def folder(name: str, limit: float = 0.8, protect: float = 0.3) -> Path:
        key = (name, limit, protect)
        if key not in made:
            streamed = tiny.stream(checkpoint(name))
            skip = Skip(dict.fromkeys(tiny.moe_layers(streamed), (limit,)), protect)
            plan = tiny.plan(streamed, lambda i, e: Keep(3 + e % 3, 16), skip=skip)
            made[key] = tmp_path_factory.mktemp("skip") / "out"
            tiny.write(streamed, plan, made[key], tiny.tokens(1))
        return made[key]

    return folder


@pytest.fixture
def batch() -> Tensor:
    """A few sequences of one length."""
    return tiny.tokens(1, seed=5, shape=(3, 24))[0]


@every_family
def test_thresholds_of_0_are_no_skipping_to_the_bit(name, compressed, batch):
    model = tiny.load(compressed(name, 0.0))
    off = tiny.logits(model, batch)
    set_skip(model, True)
    assert torch.equal(tiny.logits(model, batch), off)
    assert experts_run(model) == 1.0


@every_family
def test_a_loaded_model_skips_nothing_until_it_is_told(name, compressed, batch):
    model = tiny.load(compressed(name))
    off = tiny.logits(model, batch)
    assert experts_run(model) == 1.0
    set_skip(model, True)
    on = tiny.logits(model, batch)
    assert 0.5 < experts_run(model) < 0.95
    assert (on - off).abs().max() > 0.01
    set_skip(model, False)
    assert torch.equal(tiny.logits(model, batch), off)


@contextmanager
def weighted_by_hand(model: Any, name: str, limit: float) -> Iterator[None]:
    """Within, all experts run, with the coefficients that the rule would leave; nobody is protected."""
    family = load_family(name)
    renormalised = family.is_renormalised(model.config.get_text_config())

    def reweigh(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, idx, coef = args
        run = odp.kept(coef, (limit,) * (coef.shape[1] - 1), None)
        return x, idx, odp.rescaled(coef, run, renormalised)

    moes = [m for layer in find_layers(model)[1] if (m := find_moe(layer, family))]
    handles = [m.experts.register_forward_pre_hook(reweigh) for m in moes]
    yield
    for handle in handles:
        handle.remove()


@every_family
def test_skipping_a_pair_is_giving_it_no_weight(name, compressed, batch):
    model = tiny.load(compressed(name, 0.8, 0.0))
    with weighted_by_hand(model, name, 0.8):
        want = tiny.logits(model, batch)
    set_skip(model, True)
    torch.testing.assert_close(tiny.logits(model, batch), want, rtol=1e-4, atol=1e-5)
    assert experts_run(model) < 0.9


@every_family
def test_protecting_every_token_is_no_skipping(name, compressed, batch):
    model = tiny.load(compressed(name, 0.8, 1.0))
    off = tiny.logits(model, batch)
    set_skip(model, True)
    assert torch.equal(tiny.logits(model, batch), off)


def test_the_share_run_is_that_of_the_tokens_protected_or_light(compressed, batch):
    model = tiny.load(compressed("mixtral", 1.1, 0.25))
    set_skip(model, True)
    tiny.logits(model, batch)
    protected = int(0.25 * 24) / 24
    assert experts_run(model) == pytest.approx((2 * protected + (1 - protected)) / 2)


def left_padded(batch: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """The last tokens of each sequence, so many, as a tokenizer pads them on the left."""
    s = batch.shape[1]
    mask = torch.stack([torch.arange(s) >= s - n for n in lengths]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": batch * mask, "attention_mask": mask, "position_ids": positions}


# transformers has no sdpa for gpt_oss, because of its sinks
@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, a) for n in FAMILIES for a in ("eager", "sdpa") if (n, a) != ("gpt_oss", "sdpa")],
)
def test_a_padded_batch_gives_what_single_sequences_give(name, attention, compressed, batch):
    model = tiny.load(compressed(name), attn_implementation=attention)
    set_skip(model, True)
    inputs, lengths = left_padded(batch, [24, 17, 9]), [24, 17, 9]
    together = tiny.logits(model, inputs.pop("input_ids"), **inputs)
    run = []
    for b, n in enumerate(lengths):
        set_skip(model, True)
        alone = tiny.logits(model, batch[b : b + 1, -n:])
        run.append(experts_run(model))
        torch.testing.assert_close(together[b : b + 1, -n:], alone, rtol=1e-4, atol=1e-5)
    assert all(0.5 < share < 0.95 for share in run)


@every_family
def test_generating_goes_on_from_a_padded_batch_as_from_single_prompts(name, compressed, batch):
    model = tiny.load(compressed(name))
    set_skip(model, True)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    inputs, lengths = left_padded(batch, [24, 17, 9]), [24, 17, 9]
    del inputs["position_ids"]
    together = model.generate(**inputs, **how)
    for b, n in enumerate(lengths):
        alone = model.generate(batch[b : b + 1, -n:], **how)
        assert torch.equal(together[b, 24:], alone[0, n:])
    assert experts_run(model) < 0.95


@every_family
def test_the_attention_noted_is_what_the_model_attends(name, compressed, batch):
    model = tiny.load(compressed(name, 0.8, 0.5), attn_implementation="eager")
    with torch.no_grad():
        matrices = model(batch, output_attentions=True, use_cache=False).attentions
    noted = []

    def note(x: Tensor, received: Tensor, valid: Tensor, share: float) -> Tensor:
        noted.append((received, valid))
        return rule(x, received, valid, share)

    rule = odp.protected_tokens
    set_skip(model, True)
    with mock.patch.object(odp, "protected_tokens", note):
        tiny.logits(model, batch)
    first = len(matrices) - len(noted)  # DeepSeek's first layer is dense
    received, valid = noted[0]  # before anything was skipped
    want = matrices[first].mean(1).sum(1) / torch.arange(batch.shape[1], 0, -1)
    assert valid.all()
    torch.testing.assert_close(received, want, rtol=1e-4, atol=1e-5)


@every_family
def test_decoding_goes_by_the_ratio_alone(name, compressed, batch):
    everyone, nobody = (tiny.load(compressed(name, 0.8, p)) for p in (1.0, 0.0))
    with torch.no_grad():
        caches = [m(batch, use_cache=True).past_key_values for m in (everyone, nobody)]
        for model in (everyone, nobody):
            set_skip(model, True)
        steps = [
            m(batch[:, :1], past_key_values=c, use_cache=True).logits
            for m, c in zip((everyone, nobody), caches, strict=True)
        ]
    assert torch.equal(*steps)
    assert experts_run(everyone) == experts_run(nobody) < 0.95


@every_family
def test_saving_keeps_the_rule_and_leaves_it_switched_off(name, compressed, batch, tmp_path):
    model = tiny.load(compressed(name))
    off = tiny.logits(model, batch)
    set_skip(model, True)
    on = tiny.logits(model, batch)
    model.save_pretrained(tmp_path)
    again = tiny.load(tmp_path)
    assert torch.equal(tiny.logits(again, batch), off)
    set_skip(again, True)
    assert torch.equal(tiny.logits(again, batch), on)


@every_family
def test_expert_skip_switches_it_on_while_loading(name, compressed, batch):
    told = tiny.load(compressed(name))
    set_skip(told, True)
    loaded = tiny.load(compressed(name), expert_skip=True)
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(told, batch))
    assert experts_run(loaded) == experts_run(told) < 0.95


def test_a_checkpoint_without_a_rule_says_so(checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("mixtral"))
    tiny.write(
        streamed, tiny.plan(streamed, lambda i, e: Keep(4, 16)), tmp_path / "out", tiny.tokens()
    )
    with pytest.raises(PlanError, match="no skip rule"):
        set_skip(tiny.load(tmp_path / "out"), True)


def test_a_rule_with_a_threshold_too_many_is_refused(checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("mixtral"))
    plan = tiny.plan(streamed, lambda i, e: Keep(4, 16), skip=Skip({1: (0.5, 0.5)}))
    with pytest.raises(PlanError, match="layer 1 has 2 thresholds, wanted 1"):
        tiny.write(streamed, plan, tmp_path / "out", tiny.tokens(1))
        tiny.load(tmp_path / "out")


def test_a_packed_class_answers_as_its_family_does():
    # transformers keeps the answer on the class that was asked first; ask the packed one alone
    base = type(AutoConfig.for_model("qwen3_moe"))
    made = runtime._classes(base)[1]
    assert "_can_set_experts_implementation" in vars(made)
    assert made._can_set_experts_implementation() and made._can_set_attn_implementation()
