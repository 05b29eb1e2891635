"""Dropping channels of experts: the papers' figures, which go, and that what is left is the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_cli import SMALL, calibrated, refused, run
from test_drop import layer, made_of
from test_laws_written import assert_same_bytes, whole
from torch import Tensor

from moecule import verbs
from moecule.ask import Ask, decide, foresee, price
from moecule.budget import Inventory, bytes_by_part
from moecule.calibrate import collect
from moecule.checkpoint import Checkpoint
from moecule.errors import PlanError, RecipeError
from moecule.experts import Expert
from moecule.hf import PACKED
from moecule.inventory import take_inventory, weigh
from moecule.method import load_all
from moecule.methods import camera, heapr
from moecule.moe import experts_of, find_layers, find_moe
from moecule.narrow import Narrowing
from moecule.order import order_digest, order_file, read_plan, save_plan, with_order
from moecule.plan import Drop, Keep, Plan
from moecule.recipe import load_recipe, recipe_names
from moecule.stats import COUNT, Seen
from moecule.width import narrow_expert

few_tokens = pytest.mark.filterwarnings("ignore:.*saw fewer than 32 tokens")
NARROWING = {name: m for name, m in load_all().items() if m.channels is not None}
CHANNELS = {n: load_recipe(n) for n in recipe_names() if load_recipe(n).channels is not None}
RECIPES = [n for n, recipe in CHANNELS.items() if recipe.skip is None]  # heapr_mc: test_runs
SUMS = (COUNT, heapr.ACT_SQ, heapr.ACT_GRAD_SQ, camera.ENERGY, camera.ENERGY_MAX)


def scores(*rows: Any) -> dict[int, Tensor]:
    """By layer."""
    return {i: torch.tensor(row, dtype=torch.float64) for i, row in enumerate(rows)}


# what is counted

ACT = torch.tensor([[1.0, 2, 0], [3, -1, 0]])  # two tokens, three channels
GRAD = torch.tensor([[1.0, 0], [0, 2]])  # of the loss by what the layer's experts give
COEF = torch.tensor([0.5, 0.25])
DOWN = torch.tensor([[1.0, 0, 2], [0, 2, 1]])


def seen(act: Tensor = ACT, *, end: Any = None) -> Seen:
    """What one expert saw of them."""
    t = len(act)
    toy = Expert(torch.zeros(3, 2), DOWN, lambda x: x, end=end)
    ones, blank = torch.ones(t), torch.zeros(t, 2)
    return Seen(
        x=blank, coef=COEF[:t], prob=ones, ratio=ones, rank=torch.zeros(t).long(), total=ones, act=act,
        out=toy.out(act), routed=blank, grad=GRAD[:t], turn=None, top_k=1, renormalised=True, expert=toy,
    )  # fmt: skip


def counted(*batches: Seen) -> dict[int, dict[str, Tensor]]:
    """All that calibrating would count of one expert."""
    found: dict[str, Tensor] = {}
    for s in SUMS:
        of = s.of or s.of_expert(batches[0].expert)
        for batch in batches:
            more = of(batch).double()[None]
            found[s.name] = s.join(found[s.name], more) if s.name in found else more
    return {0: found}


def test_heapr_is_the_figure_worked_out_by_hand():
    # by the activations: 0.5 * [1, 0] and 0.25 * [0, 2] through the columns [1 0] [0 2] [2 1]
    assert seen().act_grad.tolist() == [[0.5, 0, 1], [0, 1, 0.5]]
    got = heapr.channels(counted(seen()), heapr.Options())[0]
    # means of the squares: activations 5, 2.5, 0; gradients 0.125, 0.5, 0.625
    assert got.tolist() == [[0.5 * 5 * 0.125, 0.5 * 2.5 * 0.5, 0]]
    in_all = heapr.channels(counted(seen()), heapr.Options(weigh="tokens"))[0]
    assert torch.equal(in_all, 2 * got)


def test_camera_is_the_figure_worked_out_by_hand():
    # phi: 0.5, 1, 0 and 0.75, -0.25, 0; |w|^2: 1, 4, 5
    for alpha, want in {
        0.0: [0.25 + 0.5625, 4 * (1 + 0.0625), 0],
        1.0: [0.5625, 4, 0],
        0.5: [0.5 * (0.8125 + 0.5625), 0.5 * (4.25 + 4), 0],
    }.items():
        got = camera.channels(counted(seen()), camera.Options(alpha=alpha))[0]
        torch.testing.assert_close(got, torch.tensor([want]).double(), rtol=1e-12, atol=0)


def test_batches_add_up_and_the_greatest_stays_the_greatest():
    one, two = replace(seen(ACT[:1]), grad=GRAD[:1]), seen()
    second = replace(seen(ACT[1:]), coef=COEF[1:], grad=GRAD[1:])
    assert all(
        torch.equal(a, b)
        for a, b in zip(counted(one, second)[0].values(), counted(two)[0].values(), strict=True)
    )


def test_an_alpha_outside_of_0_to_1_is_refused():
    with pytest.raises(RecipeError, match="alpha = 1.5, wanted a number from 0 to 1"):
        load_recipe("camera_p", {"channels.alpha": 1.5}).needs()


def test_the_gradient_goes_through_a_norm_at_the_end():
    plain = seen(end=lambda y: y.tanh())
    act = ACT.clone().requires_grad_()
    loss = (plain.expert.out(act) * COEF[:, None] * GRAD).sum()
    (want,) = torch.autograd.grad(loss, act)
    torch.testing.assert_close(plain.act_grad, want)


@pytest.mark.parametrize("name", NARROWING)
def test_channels_that_no_token_reached_go_first_and_permuting_experts_permutes_scores(name):
    method, g = NARROWING[name], torch.Generator().manual_seed(0)
    needs = method.needs(method.options())
    sums = {
        0: {
            s.name: torch.rand(*((8,) if s is COUNT else (8, 4)), generator=g).double() + 1
            for s in needs
        }
    }
    for t in sums[0].values():
        t[3] = 0
    order = torch.randperm(8, generator=g)
    plain = method.channels(sums, method.options())[0]
    after = method.channels({0: {n: t[order] for n, t in sums[0].items()}}, method.options())[0]
    assert torch.equal(after, plain[order]) and torch.isfinite(plain).all()
    others = plain[[e for e in range(8) if e != 3]]
    assert plain[3].max() < others.min()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_heapr_of_one_pass_is_that_of_two_with_matrices(name, checkpoint):
    """Two passes forward, one back: G of the outputs' gradients, then 1/2 mean(a^2) w G w."""
    batches = tiny.tokens(3)
    streamed = tiny.stream(checkpoint(name), torch.float64)
    got = heapr.channels(dict(collect(streamed, batches, SUMS)), heapr.Options())
    model, family = tiny.load(checkpoint(name), torch.float64, experts="eager"), streamed.family
    model.get_input_embeddings().weight.requires_grad_()
    for i, one in enumerate(find_layers(model)[1]):
        moe = find_moe(one, family)
        if moe is None:
            continue
        experts, n = experts_of(moe.experts), moe.experts.num_experts
        fisher = torch.zeros(n, *experts.down.shape[1:2] * 2, dtype=torch.float64)
        squares = torch.zeros(n, experts.down.shape[2], dtype=torch.float64)
        count = torch.zeros(n, dtype=torch.float64)
        heard: list[Any] = []
        handle = moe.experts.register_forward_hook(lambda m, args, out: heard.append((args, out)))  # noqa: B023
        for batch in batches:
            out = model(batch, use_cache=False).logits
            flat = out.float()[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(flat, batch[:, 1:].flatten(), reduction="sum")
            ((x, idx, coef), routed) = heard.pop()
            (by_routed,) = torch.autograd.grad(loss, routed)
            for e in range(n):
                t, k = torch.where(idx == e)
                g = coef[t, k][:, None] * by_routed[t]
                fisher[e] += g.mT @ g
                squares[e] += experts[e].act(x[t]).square().sum(0)
                count[e] += len(t)
        handle.remove()
        for e in range(n):
            if count[e] == 0:
                assert (got[i][e] == heapr.UNSEEN).all()
                continue
            w, mean = experts.down[e], fisher[e] / count[e]
            want = (0.5 * squares[e] / count[e] * ((mean @ w) * w).sum(0)).detach()
            assert want.max() > 1e-9
            torch.testing.assert_close(got[i][e], want, rtol=1e-6, atol=1e-6 * float(want.max()))


# how many go, and which


def test_the_lowest_go_by_expert_by_layer_or_over_all():
    of = made_of(layer(2), layer(2))
    low = torch.arange(32).double().flip(0)  # the first channels are best
    rows = {0: torch.stack([low + 100, low]), 1: torch.stack([low + 200, low + 50])}
    found = {
        spread: Narrowing(rows, of, spread).counts(0.25) for spread in ("expert", "layer", "model")
    }
    assert found["expert"] == {0: (24, 24), 1: (24, 24)}
    assert found["layer"] == {0: (None, 16), 1: (None, 16)}
    assert found["model"] == {0: (None, 0), 1: (None, None)}
    assert Narrowing(rows, of, "model").order()[0][0].tolist() == list(range(32))


@given(
    st.lists(st.integers(0, 5), min_size=4 * 32, max_size=4 * 32),
    st.sampled_from(["expert", "layer", "model"]),
    st.sampled_from([0, 1, 4, 16]),
    st.sampled_from([0.0, 0.125, 0.25, 0.4, 0.5]),
)
def test_as_many_go_as_were_asked_and_the_lowest_of_each_expert(values, spread, multiple, share):
    of = made_of(layer(2), layer(2))
    flat = torch.tensor(values).double().view(2, 2, 32)
    one = Narrowing({0: flat[0], 1: flat[1]}, of, spread, multiple)
    run, counts = one.run, one.counts(share)
    widths = [32 if c is None else c for i in (0, 1) for c in counts[i]]
    assert all(w % run == 0 for w in widths)
    pool = {"expert": 1, "layer": 2, "model": 4}[spread] * 32 // run
    gone = int(share * pool + 1e-9) * run * (128 // (pool * run))
    assert sum(widths) == 128 - gone
    order = one.order()
    for i in (0, 1):
        for e, of_expert in enumerate(order[i].tolist()):
            assert sorted(of_expert) == list(range(32))
            ranked = [float(flat[i, e, c]) for c in of_expert]
            assert ranked == sorted(ranked, reverse=True)


HEAPR, CAMERA = load_recipe("heapr"), load_recipe("camera_p")
EVEN = load_recipe("heapr", {"channels.budget": "expert"})


@pytest.mark.parametrize(
    ("recipe", "ask", "said"),
    [
        (HEAPR, Ask(drop="0.01%"), "which of 512 runs of 1 is not one; the least is 0.002"),
        (EVEN, Ask(drop="20%"), "which of 4 runs of 8 is not one; the least is 0.25"),
        (load_recipe("heapr", {"channels.multiple": 8}), Ask(drop="25%", bits=3), "rounded in runs of 32"),
        (load_recipe("heapr", {"channels.multiple": 64}), Ask(), "have 32 channels; set channels.mul"),
        (load_recipe("heapr", {"channels.multiple": -1}), Ask(), "multiples of -1 were asked for"),
        (HEAPR, Ask(size=1), "size 1 cannot be met; the least that recipe heapr takes is"),
    ],
)  # fmt: skip
def test_what_cannot_be_narrowed_is_refused_in_a_line(recipe, ask, said):
    with pytest.raises(RecipeError, match=said) as raised:
        ask.check(recipe, made_of(layer(8), layer(8)))
    assert "\n" not in str(raised.value)


def test_a_recipe_drops_experts_or_channels_not_both(tmp_path):
    text = (Path(verbs.__file__).parent / "recipes" / "heapr.toml").read_text()
    (tmp_path / "both.toml").write_text(text + '\n[score]\nmethod = "reap"\n')
    with pytest.raises(RecipeError, match=r"both \[score\] and \[channels\]"):
        load_recipe(tmp_path / "both.toml")


@pytest.mark.parametrize("recipe", [HEAPR, CAMERA, EVEN])
def test_a_share_of_the_channels_is_that_share_of_the_experts_bytes(recipe):
    of = made_of(layer(8), layer(8))
    before, after = (price(of, foresee(recipe, Ask(drop=s), of)) for s in (0, 0.25))
    assert after == 0.75 * before
    assert foresee(recipe, Ask(drop=0), of).layers == of.untouched().layers


@pytest.mark.parametrize("recipe", [HEAPR, CAMERA, EVEN])
def test_a_size_is_met_by_dropping_as_few_channels_as_will_do(recipe):
    of = made_of(layer(8), layer(8))
    whole_bytes = price(of, of.untouched())
    for size in (whole_bytes, whole_bytes * 3 // 4, whole_bytes // 2):
        found = price(of, foresee(recipe, Ask(size=size), of))
        assert size * 0.99 < found <= size


# the plan's files

KEPT = Plan(
    model="m", digest="d", encode={"method": "rtn"},
    layers={0: (Keep(channels=3), Keep(4, 64, 8), Drop(), Keep(channels=0), Keep())}, channels="x",
)  # fmt: skip


def test_a_plan_says_how_many_channels_stay():
    text = KEPT.dumps()
    for line in ("channels: x", "keep 3ch: '0'", "keep 8ch 4bit g64: '1'", "keep 0ch: '3'"):
        assert line in text
    assert Plan.loads(text) == KEPT and KEPT.narrowed


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("channels: x\n", "", "does not name which; wanted channels: and the digest"),
        ("shared: keep", "shared: keep 3ch", "only experts can be dropped"),
        ("keep 3ch", "keep 3 ch", "cannot read 'keep 3 ch'; wanted .* keep 192ch"),
    ],
)
def test_a_slip_in_it_is_named(before, after, said):
    with pytest.raises(PlanError, match=said):
        Plan.loads(KEPT.dumps().replace(before, after))


def test_the_order_of_channels_lies_beside_the_plan(tmp_path):
    order = {0: torch.stack([torch.randperm(8).int() for _ in range(5)])}
    plan, file = with_order(KEPT, order), tmp_path / "plan.yaml"
    save_plan(plan, file)
    assert order_file(file).name == "plan.channels"
    back = read_plan(file)
    assert back == plan and torch.equal(back.order[0], order[0])
    edited = plan.dumps().replace("keep 3ch", "keep 5ch")
    file.write_text(edited)
    assert read_plan(file).layers[0][0] == Keep(channels=5)
    file.write_text(edited.replace(order_digest(order), "0" * 16))
    with pytest.raises(PlanError, match="is not the order of channels that"):
        read_plan(file)
    order_file(file).unlink()
    with pytest.raises(PlanError, match="plan.channels beside it, which says which, cannot be"):
        read_plan(file)
    for wrong in (torch.zeros(5, 8).int(), torch.zeros(8).int(), torch.zeros(()), torch.ones(5, 8)):
        save_file({"layer_0000": wrong}, order_file(file))
        with pytest.raises(PlanError, match="layer 0 does not name every channel once"):
            read_plan(file)
    order_file(file).write_bytes(b"no tensors")
    with pytest.raises(PlanError, match="plan.channels beside it, which says which, cannot be"):
        read_plan(file)


# what is written


AS_IT_IS = Keep()


def narrowed(streamed: Any, width: Any, keep: Keep = AS_IT_IS) -> Plan:
    """width(layer, expert) channels of every expert, by lots."""
    plan = tiny.plan(streamed, lambda i, e: replace(keep, channels=width(i, e)))
    g, order = torch.Generator().manual_seed(1), {}
    for i, fates in plan.layers.items():
        full = experts_of(streamed.moe(i).experts).down.shape[2]
        order[i] = torch.stack([torch.randperm(full, generator=g).int() for _ in fates])
    return with_order(plan, order)


def mask(model: Any, family: Any, plan: Plan) -> Any:
    """What the channels that go give is multiplied by 0, in place."""
    for i, fates in plan.layers.items():
        down = experts_of(find_moe(find_layers(model)[1][i], family).experts).down
        for e, fate in enumerate(fates):
            down[e][:, plan.order[i][e][fate.channels :].long()] = 0
    return model


def even(layer: int, e: int) -> int:
    """One width."""
    return 8


def ragged(layer: int, e: int) -> int:
    """Many widths, none and all among them."""
    return (0, 3, 16, 8, 5)[(layer + e) % 5]


def by_layer(layer: int, e: int) -> int:
    """One width in a layer."""
    return (8, 16, 12)[layer % 3]


@tiny.every_family
@pytest.mark.parametrize("width", [even, ragged, by_layer])
def test_dropping_channels_equals_multiplying_what_they_give_by_0(
    name, width, checkpoint, tmp_path
):
    out, (batch,) = tmp_path / "out", tiny.tokens(seed=3)
    streamed = tiny.stream(checkpoint(name, dtype=torch.float32))
    plan, foreseen = narrowed(streamed, width), take_inventory(streamed)
    done = tiny.write(streamed, plan, out, tiny.tokens())
    stock = Checkpoint.open(out).config["model_type"] != PACKED
    assert stock == (done.width_key is not None)
    assert not stock or width is even
    model = tiny.load(checkpoint(name))
    before = tiny.logits(model, batch)
    want = tiny.logits(mask(model, streamed.family, plan), batch)
    assert (want - before).abs().max() > 1e-2
    after = tiny.load(out)
    torch.testing.assert_close(tiny.logits(after, batch), want, rtol=1e-4, atol=5e-5)
    weighed = weigh(Checkpoint.open(out))
    assert bytes_by_part(foreseen, plan) == weighed["bytes_by_part"]
    if not stock:
        after.save_pretrained(tmp_path / "again")
        assert_same_bytes(whole(tmp_path / "again"), whole(out))


STOCK = {"gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}


@tiny.every_family
def test_one_width_is_a_stock_checkpoint_where_a_config_key_says_it(name, checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint(name))
    done = tiny.write(streamed, narrowed(streamed, even), tmp_path / "out", tiny.tokens())
    assert (done.width_key is not None) == (
        name in STOCK
    )  # others: shared experts read the key too
    config = Checkpoint.open(tmp_path / "out").config
    if name in STOCK:
        assert config["model_type"] == name and config[done.width_key] == 8
        (after,) = {e.down.shape[2] for e in experts_in_stock(tmp_path / "out", streamed.family)}
        assert after == 8


def experts_in_stock(folder: Path, family: Any) -> list[Any]:
    """Of every layer."""
    moes = [find_moe(one, family) for one in find_layers(tiny.load(folder))[1]]
    return [experts_of(moe.experts) for moe in moes if moe is not None]


def write_and_load(
    streamed: Any, plan: Plan, foreseen: Inventory, out: Path, batches: list[Any]
) -> None:
    """What is loaded computes what was written, and weighs what was foreseen."""
    done = tiny.write(streamed, plan, out, batches)
    model = tiny.load(out)
    for batch, hidden in zip(batches, done.last, strict=True):
        with torch.no_grad():
            want = streamed.logits(hidden, batch)
        torch.testing.assert_close(tiny.logits(model, batch), want, rtol=1e-4, atol=5e-5)
    assert bytes_by_part(foreseen, plan) == weigh(Checkpoint.open(out))["bytes_by_part"]


@tiny.every_family
def test_channels_go_and_then_bits(name, checkpoint, tmp_path):
    batches, streamed = tiny.tokens(2), tiny.stream(checkpoint(name))
    plan, foreseen = narrowed(streamed, by_layer, Keep(4, 8)), take_inventory(streamed)
    plan = replace(plan, encode={"method": "gptq"})
    write_and_load(streamed, plan, foreseen, tmp_path / "out", batches)
    many = replace(
        plan, layers=narrowed(streamed_again(checkpoint(name)), ragged, Keep(4, 8)).layers
    )
    with pytest.raises(
        PlanError, match="experts of many widths are rounded in runs|experts have biases or"
    ):
        tiny.write(streamed_again(checkpoint(name)), many, tmp_path / "many", batches)


@pytest.mark.parametrize("width", [even, ragged])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_go_and_channels_of_those_that_stay(name, width, checkpoint, tmp_path):
    batches, streamed = tiny.tokens(2), tiny.stream(checkpoint(name))
    plan, foreseen = narrowed(streamed, width), take_inventory(streamed)
    layers = {
        i: tuple(Drop() if e % 4 == 1 else f for e, f in enumerate(fates))
        for i, fates in plan.layers.items()
    }
    plan = replace(plan, layers=layers)
    write_and_load(streamed, plan, foreseen, tmp_path / "out", batches)
    assert (Checkpoint.open(tmp_path / "out").config["model_type"] == name) == (
        width is even and name in STOCK
    )


def streamed_again(folder: Path) -> Any:
    """Afresh: writing uses a model up."""
    return tiny.stream(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda p: replace(p, order={}),
            "the order of channels that goes with the plan is not of 8",
        ),
        (lambda p: with_width(p, 17), "keeps 17 channels; the model's have 16"),
        (lambda p: with_width(p, 0), "no expert keeps a channel"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, said, checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("qwen3_moe"))
    with pytest.raises(PlanError, match=said):
        tiny.write(streamed, change(narrowed(streamed, even)), tmp_path / "out", [])


def with_width(plan: Plan, width: int) -> Plan:
    """All experts keep so many."""
    return replace(
        plan, layers={i: (Keep(channels=width),) * len(f) for i, f in plan.layers.items()}
    )


@pytest.mark.parametrize("name", ["nemotron_h", "gpt_oss", "qwen3_moe"])
def test_a_narrow_expert_gives_what_the_whole_one_does_without_the_rest(name, checkpoint):
    streamed = tiny.stream(checkpoint(name))
    i = max(tiny.moe_layers(streamed))
    streamed.load_layer(i)
    module = streamed.moe(i).experts
    expert, at = experts_of(module)[2], torch.tensor([14, 3, 7])
    x = tiny.normal(5, expert.gate_up.shape[1])
    narrow = narrow_expert(module, expert, at)
    assert torch.allclose(narrow.act(x), expert.act(x)[:, at], atol=1e-6)
    assert torch.equal(narrow.down, expert.down[:, at])


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_permuting_a_models_experts_permutes_which_channels_go(name, checkpoint, tmp_path):
    order = [2, 0, 3, 1, 5, 7, 4, 6]  # within the halves, which are the groups where there are any
    tiny.permuted(checkpoint(name), order, tmp_path)
    batches, plans = tiny.tokens(4), []
    for folder in (checkpoint(name), tmp_path):
        streamed = tiny.stream(folder)
        inventory, sums = take_inventory(streamed), dict(collect(streamed, batches, SUMS))
        one_width = {
            r: {"channels.budget": "expert"} if CHANNELS[r].bits < 16 else {} for r in RECIPES
        }
        plans.append(
            {
                r: decide(load_recipe(r, one_width[r]), Ask(drop=0.5), sums, inventory)
                for r in RECIPES
            }
        )
    for r in RECIPES:
        before, after = (p[r] for p in plans)
        assert before.layers != after.layers
        for i, fates in before.layers.items():
            assert tuple(fates[e] for e in order) == after.layers[i]
            for new, old in enumerate(order):
                n = after.layers[i][new].channels
                stay = [set(p.order[i][e][:n].tolist()) for p, e in ((before, old), (after, new))]
                assert stay[0] == stay[1]


# as users do it


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory) -> Path:
    """model/, text.txt, and stats of both recipes."""
    return calibrated(tmp_path_factory.mktemp("place"), checkpoint, RECIPES)


CASES = [
    ("heapr", (), False),
    ("camera_p", (), False),
    ("heapr", ("--set", "channels.budget=expert"), True),
    ("camera_p", ("--set", "channels.budget=expert", "--bits", "4"), False),
]


@pytest.mark.parametrize(("recipe", "more", "stock"), CASES)
@few_tokens
def test_what_is_left_loads_and_weighs_what_was_foreseen(recipe, more, stock, place, here):
    stats, file = place / f"stats_{recipe}", here / "p.yaml"
    args = ("--recipe", recipe, "--drop", "50%", *more)
    code, out, err = run("plan", stats, "-o", file, *args)
    assert code == 0 and "0.5 of the experts' weights dropped, " in out, err
    text = ("--data", place / "text.txt", *SMALL)
    code, _, err = run("apply", place / "model", file, "-o", here / "out", *text)
    assert code == 0, err
    made = Checkpoint.open(here / "out")
    assert made.config["model_type"] == ("qwen3_moe" if stock else "moecule")
    inventory = Inventory.from_dict(json.loads((stats / "meta.json").read_text())["inventory"])
    assert made.size_bytes == sum(bytes_by_part(inventory, read_plan(file)).values())
    assert (here / "out" / "plan.channels").is_file()
    (batch,) = tiny.tokens()
    assert torch.isfinite(tiny.logits(tiny.load(here / "out"), batch)).all()
    code, _, err = run("apply", place / "model", file, "-o", here / "out", *text)
    assert code == 0, err  # what is there is that


@few_tokens
@pytest.mark.slow
def test_compress_narrows_and_measures_and_a_fresh_process_agrees(place, tmp_path):
    text = ("--data", place / "text.txt", "--text", place / "text.txt", *SMALL)
    args = ("compress", place / "model", "-o", tmp_path / "out", "--recipe", "heapr", *text)
    for _ in range(2):
        code, out, err = run(*args, "--json")
        assert code == 0, err
    assert json.loads(out)["nominal_bits"] == 16
    said = refused(tmp_path, *args, "--drop", "25%", "--bits", "3")
    assert "experts of many widths are rounded in runs of 32 channels" in said
