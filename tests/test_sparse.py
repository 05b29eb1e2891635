"""Weights made 0: the papers' figures, how many of each layer, and that they are 0 in the file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from test_drop import layer, made_of
from torch import Tensor

from moecule.apply import check_plan
from moecule.ask import Ask, decide
from moecule.calibrate import collect
from moecule.checkpoint import Checkpoint
from moecule.errors import PlanError, RecipeError
from moecule.experts import Experts
from moecule.inventory import take_inventory
from moecule.methods import owl, sparsegpt, wanda
from moecule.moe import experts_of, listening
from moecule.order import with_order
from moecule.plan import Drop, Keep, Plan
from moecule.recipe import load_recipe
from moecule.stats import Block
from moecule.walk import walk
from moecule.zeros import Sparse

W = torch.tensor([[[1.0, -2, 3, 4], [4, 3, 2, -1]]])
SEEN = torch.tensor([[16.0, 4, 1, 0.25]])  # lengths 4, 2, 1, 0.5


def test_wanda_is_the_figure_worked_out_by_hand():
    # metrics: 4 4 3 2 and 16 6 2 0.5
    half = wanda.mask(W, SEEN, 0.5, wanda.Options())
    assert half.tolist() == [[[1, -2, 0, 0], [4, 3, 0, 0]]]
    assert wanda.mask(W, SEEN, 0.25, wanda.Options()).tolist() == [[[1, 0, 0, 0], [4, 0, 0, 0]]]
    # 0.6 of 4 columns is to stay: no more go than were asked
    assert (wanda.mask(W, SEEN, 0.6, wanda.Options()) != 0).sum(-1).tolist() == [[3, 3]]


def test_an_expert_that_no_token_reached_keeps_its_largest_weights():
    none = torch.zeros(1, 4)
    assert wanda.mask(W, none, 0.5, wanda.Options()).tolist() == [[[0, 0, 3, 4], [4, 3, 0, 0]]]
    got = sparsegpt.mask(W, torch.zeros(1, 4, 4), 0.5, sparsegpt.Options())
    assert got.tolist() == [[[0, 0, 3, 4], [4, 3, 0, 0]]]


def test_sparsegpt_is_the_figure_worked_out_by_hand():
    # the inverse of H is [[2, -1], [-1, 2]] / 3; of its factor U_00^2 = 2/3 and U_01 U_00 = -1/3
    gram = torch.tensor([[[2.0, 1], [1, 2]]])
    got = sparsegpt.mask(torch.tensor([[[1.0, 3]]]), gram, 0.5, sparsegpt.Options(damp=1e-9))
    # the 1 goes, and what the other column gets is 3 - 1 / U_00 * U_01 = 3 + 1/2
    torch.testing.assert_close(got, torch.tensor([[[0.0, 3.5]]]))


@pytest.mark.parametrize("block", [4, 128])
def test_sparsegpt_cuts_as_much_and_loses_less_than_wanda(block):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(2, 16, 24, generator=g)
    x = torch.randn(2, 200, 24, generator=g) @ torch.randn(2, 24, 24, generator=g)
    x[1, :, 5] = 0  # nobody reads it
    gram = x.mT @ x
    found = {
        "wanda": wanda.mask(w, gram.diagonal(dim1=1, dim2=2), 0.5, wanda.Options()),
        "sparsegpt": sparsegpt.mask(w, gram, 0.5, sparsegpt.Options(block=block)),
    }
    loss = {n: ((x @ (m - w).mT) ** 2).sum((1, 2)) for n, m in found.items()}
    assert (loss["sparsegpt"] < 0.9 * loss["wanda"]).all()
    assert ((found["sparsegpt"] != 0).sum((1, 2)) == 16 * 12).all()
    assert (found["sparsegpt"][1, :, 5] == 0).all()
    for n, method in (("wanda", wanda), ("sparsegpt", sparsegpt)):
        seen = gram if n == "sparsegpt" else gram.diagonal(dim1=1, dim2=2)
        options = sparsegpt.Options(block=block) if n == "sparsegpt" else wanda.Options()
        turned = method.mask(w.flip(0), seen.flip(0), 0.5, options)
        torch.testing.assert_close(turned, found[n].flip(0))


def block_of(gate_up: Tensor, down: Tensor, count: list[float]) -> Block:
    """Of experts that read inputs of mean square 4, and activations of mean square 1."""
    n = torch.tensor(count).double()
    sums = {
        "count": n,
        "in_sq": 4 * n[:, None].expand(-1, gate_up.shape[2]),
        "act_sq": n[:, None].expand(-1, down.shape[2]),
    }
    experts = Experts(gate_up, down, lambda x: x)
    return Block(experts, torch.zeros(len(n), 2).double(), 1, sums, lambda kept: 0.0)


def test_what_stands_out_is_counted_over_the_whole_layer():
    up, down = torch.ones(3, 2, 2), torch.ones(3, 2, 2)
    up[0, 0, 0], down[1, 1, 0] = 20, -20
    # metrics: 40 and seven of 2 or 1; 20 and seven of 2 or 1: the mean of 16 is (40 + 20 + 22) / 16
    of = block_of(up, down, [3, 5, 0])
    assert owl.outliers(of, 5.0).tolist() == [1 / 8, 0, 0]  # above 25.6
    assert owl.outliers(of, 3.0).tolist() == [1 / 8, 1 / 8, 0]


def of_layers(*shares: list[float]) -> dict[int, dict[str, Tensor]]:
    """Sums, as densities reads them."""
    found = {i: torch.tensor(of).double() for i, of in enumerate(shares)}
    return {i: {"count": torch.ones_like(t), "outliers_5": t} for i, t in found.items()}


def test_densities_are_the_figures_worked_out_by_hand():
    sums = of_layers([0.02, 0.04], [0.01, 0.01], [0.05, 0.05])
    # 0.03, 0.01, 0.05 stretched to 0.08, 0, 0.16, less their mean 0.08
    got = owl.densities(sums, owl.Options(share=0.4))
    assert got == pytest.approx({0: 0.6, 1: 0.52, 2: 0.68})
    assert owl.densities(sums, owl.Options(share=0.4, width=0.0)) == {0: 0.6, 1: 0.6, 2: 0.6}
    # a layer of fewer experts counts for less: stretched to 0.16, 0, 0 the mean is 0.04
    few = owl.densities(of_layers([0.05], [0.01], [0.01] * 2), owl.Options(share=0.4))
    assert few == pytest.approx({0: 0.72, 1: 0.56, 2: 0.56})
    assert owl.densities(of_layers([0.1], [0.0]), owl.Options(share=0.97)) == pytest.approx(
        {0: 0.11, 1: 0.01}
    )


@pytest.mark.parametrize("change", [{"share": 1.0}, {"share": 0.0}, {"width": -1.0}, {"m": 0.0}])
def test_a_share_that_is_none_is_refused(change):
    with pytest.raises(RecipeError, match="owl: share = .* wanted a share between 0 and 1"):
        load_recipe("owl", {f"sparsify.{k}": v for k, v in change.items()})


def test_a_share_without_a_mask_is_refused(tmp_path):
    text = (
        'about = "x"\n[sparsify]\nmethod = "owl"\n[allocate]\nmethod = "uniform"\n'
        '[encode]\nmethod = "rtn"\n'
    )
    (tmp_path / "half.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"\[sparsify\] and \[mask\] go together"):
        load_recipe(tmp_path / "half.toml")


# the plan

PLAN = replace(
    made_of(layer(4), layer(4)).untouched(), sparse=Sparse({0: 0.6, 1: 0.55}, {"method": "wanda"})
)


def test_a_plan_says_what_stays_of_each_layer_and_reads_it_again():
    text = PLAN.dumps()
    assert "sparse:\n  mask:\n    method: wanda\n  density:\n    0: 0.6\n    1: 0.55\n" in text
    assert Plan.loads(text) == PLAN


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("0: 0.6", "0: 0", "densities above 0 and up to 1"),
        ("0: 0.6", "0: 1.5", "densities above 0 and up to 1"),
        ("0: 0.6", "0: .nan", "densities above 0 and up to 1"),
        ("0: 0.6", "0: half", "sparse wants mask and density per layer"),
        ("    method: wanda", "", "sparse wants mask and density per layer"),
        ("0: 0.6", "x: 0.6", "sparse wants"),
    ],
)
def test_densities_that_are_none_are_refused(before, after, said):
    with pytest.raises(PlanError, match=said) as raised:
        Plan.loads(PLAN.dumps().replace(before, after, 1))
    assert "\n" not in str(raised.value)


# through the model


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # plain; transposed, interleaved, biased
def test_the_weights_of_least_metric_are_0_in_a_stock_checkpoint(name, checkpoint, tmp_path):
    streamed, batches = tiny.stream(checkpoint(name)), tiny.tokens(2)
    first = min(tiny.moe_layers(streamed))
    plan = tiny.plan(streamed, lambda i, e: Keep())
    plan = replace(plan, sparse=Sparse({first: 0.5}, {"method": "wanda"}))
    want: dict[str, list[Tensor]] = {"gate_up": [], "down": []}
    plain = tiny.stream(checkpoint(name))
    for step in walk(plain, batches):
        if step.index != first:
            continue
        moe = plain.moe(step.index)
        with listening(moe) as heard:
            step.run()
        experts = experts_of(moe.experts)
        for e in range(len(experts)):
            x = torch.cat(
                [x[(idx == e).any(-1)] for x, idx in zip(heard.x, heard.idx, strict=True)]
            )
            up = cut(experts[e].gate_up, x)
            act = replace(experts[e], gate_up=up).act(x)
            want["gate_up"].append(up)
            want["down"].append(cut(experts[e].down, act))
    tiny.write(streamed, plan, tmp_path, batches)
    assert Checkpoint.open(tmp_path).config["model_type"] == name
    sizes = [
        sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (tmp_path, checkpoint(name))
    ]
    assert abs(sizes[0] - sizes[1]) < 2000  # headers: zeros are written as they are
    opened = tiny.stream(tmp_path)
    for step in walk(opened, batches):
        moe = opened.moe(step.index)
        if moe is None:
            continue
        got = experts_of(moe.experts)
        if step.index != first:
            assert (got.down != 0).all()
            continue
        for name_, of in want.items():
            assert torch.equal(getattr(got, name_), torch.stack(of))


def cut(w: Tensor, x: Tensor) -> Tensor:
    """Half of every row, the least of |w| times the length of what it reads."""
    length = x.double().square().sum(0).float()
    metric = w.abs() * (length if len(x) else torch.ones_like(length)).sqrt()
    out = w.clone()
    for row, of in zip(out, metric, strict=True):
        row[of.argsort(stable=True, descending=True)[-(-len(row) // 2) :]] = 0
    return out


def test_stun_drops_then_cuts(checkpoint, tmp_path):
    recipe = load_recipe("stun", {"sparsify.share": 0.4, "mask.method": "sparsegpt"})
    streamed, batches = tiny.stream(checkpoint("qwen3_moe")), tiny.tokens(2)
    sums, inventory = dict(collect(streamed, batches, recipe.needs())), take_inventory(streamed)
    ask = Ask(drop="25%")
    assert ask.text(recipe) == "drop 25%, 16 bits, 40% of what stays 0 (no fewer bytes)"
    for more in ({"bits": 8}, {"size": "1MB"}):  # rounding has no 0
        with pytest.raises(RecipeError, match="rounding, which has no 0"):
            Ask(drop="25%", **more).check(recipe, inventory)
    plan = decide(recipe, ask, sums, inventory)
    assert plan.dropped == sum(len(of) for of in plan.layers.values()) // 4
    kept = {i: sum(f != Drop() for f in of) for i, of in plan.layers.items()}
    share = sum(n * plan.sparse.density[i] for i, n in kept.items()) / sum(kept.values())
    assert share == pytest.approx(0.6, abs=1e-4)
    plan = replace(plan, digest=streamed.checkpoint.digest, encode={"method": "rtn"})
    plan = Plan.loads(plan.dumps())
    rounded = {
        i: tuple(replace(f, bits=8, group=32) if f != Drop() else f for f in of)
        for i, of in plan.layers.items()
    }
    with pytest.raises(PlanError, match="would undo it"):
        check_plan(replace(plan, layers=rounded), streamed)
    done = tiny.write(tiny.stream(checkpoint("qwen3_moe")), plan, tmp_path, batches)
    model = tiny.load(tmp_path)
    for batch, hidden in zip(batches, done.last, strict=True):
        with torch.no_grad():
            want = streamed.logits(hidden, batch)
        torch.testing.assert_close(tiny.logits(model, batch), want, rtol=1e-4, atol=5e-5)


def test_what_no_plan_can_do_is_refused(checkpoint, tmp_path):
    streamed = tiny.stream(checkpoint("qwen3_moe"))
    plain = tiny.plan(streamed, lambda i, e: Keep())
    for sparse, said in (
        (Sparse({99: 0.5}, {"method": "wanda"}), "sparse names layers"),
        (
            Sparse({}, {"method": "rtn"}),
            "method 'rtn' has no mask; those that have are sparsegpt, wanda",
        ),
    ):
        with pytest.raises((PlanError, RecipeError), match=said):
            tiny.write(streamed, replace(plain, sparse=sparse), tmp_path, [])
    (i, n), *_ = tiny.moe_layers(streamed).items()
    full = experts_of(streamed.moe(i).experts).down.shape[2]
    order = {j: torch.arange(full).int().repeat(m, 1) for j, m in tiny.moe_layers(streamed).items()}
    ragged = tiny.plan(streamed, lambda i, e: Keep(channels=8 * (1 + e % 2)))
    ragged = replace(with_order(ragged, order), sparse=Sparse({i: 0.5}, {"method": "wanda"}))
    with pytest.raises(PlanError, match="experts of many widths, and sparse"):
        tiny.write(streamed, ragged, tmp_path, [])
