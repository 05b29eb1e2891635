"""Masks that are learnt: the candidates, the head, and what a loaded checkpoint does with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moecule import experts_run, set_skip
from moecule.ask import price
from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError, PlanError, RecipeError
from moecule.inventory import take_inventory, weigh
from moecule.learnt import named, put_heads
from moecule.methods import otp
from moecule.plan import Keep, Masks, Plan
from moecule.recipe import load_recipe
from moecule.session import Compute, stream_any

seeds = st.integers(0, 2**32 - 1)
FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe"]
every_family = pytest.mark.parametrize("name", FAMILIES)
HOW = load_recipe("mc_sharp").skip.as_dict() | {"hidden": 6}


def pairs(seed: int, tokens: int, k: int, width: int = 12) -> tuple[Tensor, Tensor]:
    """(what experts hear, coefficients in no order)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=draw)
    return x, torch.rand(tokens, k, generator=draw) ** 3 + 1e-3


def lively(seed: int, k: int, width: int = 12) -> dict[str, Tensor]:
    """A head whose masks differ from token to token."""
    head = otp.first_head(0, width, k, otp.Options(hidden=6, seed=seed % 1000))
    draw = torch.Generator().manual_seed(seed)
    head["down"] = torch.randn(head["down"].shape, generator=draw)
    head["down_bias"] = torch.zeros(k)
    return head


@given(seeds, st.integers(1, 8))
def test_a_head_that_has_not_learnt_runs_every_pair(seed, k):
    x, coef = pairs(seed, 20, k)
    head = otp.first_head(3, 12, k, otp.Options(hidden=6, seed=seed % 1000))
    scores = otp.scores(head, x, otp.ranked(coef)[0])
    assert otp.hard(scores).all()
    if k > 1:
        torch.testing.assert_close(scores.softmax(-1)[:, -1], torch.full((20,), otp.ALL_RUN))


@given(seeds, st.integers(1, 8))
def test_a_hard_mask_is_the_prefix_of_highest_score_and_has_the_largest_coefficients(seed, k):
    x, coef = pairs(seed, 20, k)
    ordered, order = otp.ranked(coef)
    scores = otp.scores(lively(seed, k), x, ordered)
    by_rank = otp.hard(scores)
    assert torch.equal(by_rank.sum(-1), scores.argmax(-1) + 1)
    assert torch.equal(by_rank.float(), otp.prefixes(k)[scores.argmax(-1)])
    run = otp.unranked(by_rank, order)
    for row, kept in zip(coef, run, strict=True):
        assert not (~kept).any() or row[kept].min() >= row[~kept].max()


@given(seeds, st.integers(2, 8), st.sampled_from([0.1, 1.0, 4.0]))
def test_a_drawn_mask_is_a_prefix_too_and_has_the_soft_masks_gradient(seed, k, tau):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(20, k, generator=draw, requires_grad=True)
    noise, weight = torch.rand(20, k, generator=draw), torch.randn(20, k, generator=draw)
    mask = otp.drawn(scores, noise, tau)
    run = mask.detach().round()
    torch.testing.assert_close(mask.detach(), run, atol=1e-5, rtol=0)
    assert (run[:, 0] == 1).all() and (run.diff(dim=-1) <= 0).all()
    (found,) = torch.autograd.grad((mask * weight).sum(), scores)
    soft = ((scores - (-noise.clamp(1e-9, 1 - 1e-7).log()).log()) / tau).softmax(-1)
    (wanted,) = torch.autograd.grad((soft @ otp.prefixes(k) * weight).sum(), scores)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_masks_are_drawn_as_often_as_their_scores_say():
    chance = torch.tensor([0.1, 0.2, 0.7])
    noise = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0))
    drawn = otp.drawn(chance.log().expand(20000, 3), noise, 0.5).sum(-1).round() - 1
    found = torch.bincount(drawn.long(), minlength=3) / 20000
    torch.testing.assert_close(found, chance, atol=0.015, rtol=0)


@given(seeds, st.integers(1, 8), st.booleans())
def test_with_every_pair_coefficients_stay_to_the_bit_and_else_keep_their_sum(
    seed, k, renormalised
):
    x, coef = pairs(seed, 20, k)
    every = torch.ones_like(coef)
    assert torch.equal(otp.weighed(coef, every, renormalised), coef)
    ordered, order = otp.ranked(coef)
    run = otp.unranked(otp.hard(otp.scores(lively(seed, k), x, ordered)), order)
    new = otp.weighed(coef, run, renormalised)
    assert (new[~run] == 0).all()
    if renormalised:
        torch.testing.assert_close(new.sum(-1), coef.sum(-1))
    else:
        assert torch.equal(new, coef * run)


def test_the_temperature_falls_from_the_first_step_to_the_last():
    options = otp.Options(steps=101, hot=4.0, cold=0.1)
    taus = [otp.temperature(i, options) for i in range(101)]
    assert taus[0] == 4.0 and taus[-1] == pytest.approx(0.1)
    assert taus[50] == pytest.approx((4.0 * 0.1) ** 0.5)
    assert all(a > b for a, b in zip(taus, taus[1:], strict=False))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 0.0}, "keep = 0"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"hot": 0.05}, "temperatures"),
        ({"cold": 0.0}, "temperatures"),
        ({"lr": 0.0}, "lr = 0"),
        ({"hidden": 0}, "hidden = 0"),
        ({"steps": 0}, "steps = 0"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("mc_sharp", {f"skip.{k}": v for k, v in changes.items()})


def test_skip_takes_a_method_of_either_kind_and_no_other():
    assert load_recipe("mc_sharp").skip.method == "otp"
    with pytest.raises(RecipeError, match="no thresholds or learn; those that have are odp, otp"):
        load_recipe("mc", {"skip.method": "reap"})


@pytest.fixture(scope="module")
def compressed(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """compressed(name, lively): with a head in every MoE layer, which has not learnt, or is `lively`."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(name: str, *, learnt: bool = False) -> Path:
        if (name, learnt) not in made:
            out = made[name, learnt] = tmp_path_factory.mktemp("masks") / "out"
            streamed = tiny.stream(checkpoint(name))
            plan = tiny.plan(streamed, lambda i, e: Keep(3 + e % 3, 16), skip=Masks(HOW))
            tiny.write(streamed, plan, out, tiny.tokens(1))
            if learnt:
                put_heads(out, lively_heads(out))
        return made[name, learnt]

    return folder


def lively_heads(out: Path) -> dict[str, Tensor]:
    """For every place that the checkpoint has for one."""
    shapes = {n: t.shape for n, t in Checkpoint.open(out).tensors.items()}
    found = {}
    for i, name in enumerate(sorted(n for n in shapes if n.endswith(".skip.down"))):
        width, k = shapes[name.removesuffix("down") + "up"][1], shapes[name][0]
        found |= named(name.removesuffix(".skip.down"), lively(i, k, width - k))
    return found


@pytest.fixture
def batch() -> Tensor:
    """A few sequences of one length."""
    return tiny.tokens(1, seed=5, shape=(3, 24))[0]


@every_family
def test_before_learning_it_is_no_skipping_to_the_bit(name, compressed, batch):
    model = tiny.load(compressed(name))
    off = tiny.logits(model, batch)
    set_skip(model, True)
    assert torch.equal(tiny.logits(model, batch), off)
    assert experts_run(model) == 1.0


@every_family
def test_a_loaded_model_skips_when_it_is_told_and_saving_keeps_its_heads(
    name, compressed, batch, tmp_path
):
    model = tiny.load(compressed(name, learnt=True))
    off = tiny.logits(model, batch)
    set_skip(model, True)
    on, run = tiny.logits(model, batch), experts_run(model)
    assert 0.5 < run < 0.95 and (on - off).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    again = tiny.load(tmp_path, expert_skip=True)
    assert torch.equal(tiny.logits(again, batch), on) and experts_run(again) == run
    set_skip(again, False)
    assert torch.equal(tiny.logits(again, batch), off)


@every_family
def test_a_padded_batch_and_decoding_go_token_by_token(name, compressed, batch):
    model = tiny.load(compressed(name, learnt=True))
    set_skip(model, True)
    whole = tiny.logits(model, batch)
    with torch.no_grad():
        cache = model(batch[:, :20], use_cache=True).past_key_values
        steps = [model(batch[:, i : i + 1], past_key_values=cache).logits for i in range(20, 24)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 20:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_stay_float32_whatever_the_models_dtype(dtype, compressed, batch):
    folder = compressed("mixtral", learnt=True)
    wanted = lively_heads(folder)
    model = tiny.load(folder, dtype)
    state = model.to(dtype).state_dict()
    assert all(torch.equal(state[n], t) for n, t in wanted.items())
    rule = next(m for n, m in model.named_modules() if n.endswith("experts.skip"))
    x, coef = pairs(0, 40, 2, rule.up.shape[1] - 2)
    set_skip(model, True)
    idx, new = rule(x.to(dtype), torch.zeros_like(coef, dtype=torch.int64), coef.to(dtype), 8)
    head = {n: t.view(torch.float32) for n, t in rule.named_buffers()}
    ordered, order = otp.ranked(coef.to(dtype))
    run = otp.unranked(otp.hard(otp.scores(head, x.to(dtype), ordered)), order)
    assert 0 < int((~run).sum()) < 40
    assert torch.equal(idx == 8, ~run) and torch.equal(new, otp.weighed(coef.to(dtype), run, True))


def test_a_streamed_model_skips_as_the_loaded_one(compressed, batch):
    folder = compressed("mixtral", learnt=True)
    streamed = stream_any(folder, Compute("cpu"), skip=True)
    last = tiny.walked(streamed, [batch]).last[0]
    model = tiny.load(folder, expert_skip=True)
    wanted = tiny.logits(model, batch)
    torch.testing.assert_close(streamed.logits(last, batch), wanted, rtol=1e-4, atol=1e-4)
    assert experts_run(streamed.model) == experts_run(model)


@every_family
def test_the_price_of_a_plan_with_heads_is_the_size_of_its_files(name, checkpoint, compressed):
    folder = compressed(name)
    plan = Plan.loads((folder / "plan.yaml").read_text())
    assert plan.skip == Masks(HOW)
    inventory, weighed = (
        take_inventory(tiny.stream(checkpoint(name))),
        weigh(Checkpoint.open(folder)),
    )
    assert price(inventory, plan) == weighed["size_bytes"]
    heads = [t for n, t in Checkpoint.open(folder).stored.items() if ".skip." in n]
    without = replace(plan, skip=None)
    assert (
        price(inventory, plan) - price(inventory, without) == sum(t.size_bytes for t in heads) > 0
    )


def test_heads_lie_in_one_file_which_alone_is_replaced(checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("mixtral"))
    plan = tiny.plan(streamed, lambda i, e: Keep(4, 16), skip=Masks(HOW))
    tiny.write(streamed, plan, tmp_path, tiny.tokens(1), shard_bytes=20_000)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")}
    put_heads(tmp_path, lively_heads(tmp_path))
    after = {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")}
    assert len(after) > 3
    assert [n for n in after if after[n] != before[n]] == ["model-skip.safetensors"]
    assert experts_run_of(tmp_path) < 0.95


def experts_run_of(folder: Path) -> float:
    """On a few tokens."""
    model = tiny.load(folder, expert_skip=True)
    tiny.logits(model, tiny.tokens(1, seed=5)[0])
    return experts_run(model)


def test_heads_for_a_checkpoint_without_a_place_are_refused(compressed, checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("mixtral"))
    tiny.write(streamed, tiny.plan(streamed, lambda i, e: Keep(4, 16)), tmp_path, tiny.tokens(1))
    with pytest.raises(CheckpointError, match="no place for masks"):
        put_heads(tmp_path, lively_heads(compressed("mixtral")))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"keep": 0.3}, PlanError, "keep is 0.3, and a token's first expert always runs, 0.5"),
        ({"method": "odp"}, RecipeError, "has no learn"),
        ({"colour": 1}, RecipeError, "unknown key 'colour'"),
    ],
)
def test_a_plan_with_masks_that_cannot_be_is_refused(changes, error, said, checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("mixtral"))
    plan = tiny.plan(streamed, lambda i, e: Keep(4, 16), skip=Masks(HOW | changes))
    with pytest.raises(error, match=said):
        tiny.write(streamed, plan, tmp_path / "out", tiny.tokens(1))
    assert not (tmp_path / "out" / "config.json").exists()


def test_masks_for_a_router_that_picks_one_are_refused(checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("mixtral"))
    plan = tiny.plan(streamed, lambda i, e: Keep(4, 16), skip=Masks(HOW))
    with pytest.raises(PlanError, match="picks one expert a token"):
        tiny.write(streamed, replace(plan, top_k=1), tmp_path / "out", tiny.tokens(1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{method: otp, keep: 0.8}", "hidden is None"),
        ("{method: otp, keep: 0.8, hidden: true}", "hidden is True"),
        ("{method: otp, keep: 0, hidden: 4}", "keep is 0"),
        ("{protect: 0.1}", "or a method and its options"),
    ],
)
def test_a_plans_text_about_masks_is_read_with_care(text, said, compressed):
    whole = (compressed("mixtral") / "plan.yaml").read_text().splitlines()
    at = whole.index("skip:")
    end = next(i for i in range(at + 1, len(whole)) if not whole[i].startswith(" "))
    with pytest.raises(PlanError, match=said):
        Plan.loads("\n".join([*whole[:at], f"skip: {text}", *whole[end:]]))


def test_the_config_says_what_the_plan_did(compressed):
    doc = json.loads((compressed("mixtral") / "config.json").read_text())
    assert doc["quantization_config"]["skip"] == HOW and doc["expert_skip"] is False
