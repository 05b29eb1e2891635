"""PMQ: the authors' own figures, brute force, and the error it reads, measured the long way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecule.calibrate import collect
from moecule.errors import RecipeError
from moecule.grid import CLIPS, quantized
from moecule.methods import pmq
from moecule.moe import experts_of, put_experts
from moecule.stats import COUNT, MASS
from moecule.walk import walk

GOLDEN = Path(__file__).parent / "golden" / "mixtral_factors.json"
FACTORS = json.loads(GOLDEN.read_text())
CASES = [(total, i) for total in FACTORS["bits"] for i in range(len(FACTORS["layers"]))]
PLAIN = {"alpha": 0.0, "beta": 0.0}  # the cost is the error itself
bit_sets = st.sampled_from([(1, 2, 3), (2, 3, 4), (1, 2, 3, 4), (2, 4), (3,)])
seeds = st.integers(0, 2**32 - 1)


def solved(factors: dict[str, Any], total: str, layer: int) -> tuple[int, ...]:
    """With the exponents of the authors' code."""
    error = np.array([factors["error"][b][layer] for b in "123"]).T
    count, mass = factors["count"][layer], factors["mass"][layer]
    return pmq.solve(count, mass, error, int(total))


@pytest.mark.parametrize(("total", "layer"), CASES)
def test_the_authors_solver_is_reproduced(total, layer):
    assert list(solved(FACTORS, total, layer)) == FACTORS["bits"][total][layer]


def test_the_authors_solver_is_reproduced_in_all_160_cases(shared):
    factors = json.loads((shared / "data" / "mixtral_8x7b_factors.json").read_text())
    found = {b: [list(solved(factors, b, i)) for i in range(32)] for b in factors["bits"]}
    assert found == factors["bits"]
    assert sum(map(len, found.values())) == 160


def feasible(n: int, bits: Sequence[int], floor: int) -> list[tuple[int, ...]]:
    """Every allocation that meets the floors of the two widest classes."""
    wide = sorted(bits)[-2:] if len(bits) > 1 else []
    every = itertools.product(bits, repeat=n)
    return [a for a in every if all(a.count(b) >= floor for b in wide)]


def price(cost: np.ndarray, bits: Sequence[int], allocation: Sequence[int]) -> float:
    """The objective."""
    return float(sum(row[bits.index(b)] for row, b in zip(cost, allocation, strict=True)))


@given(st.integers(1, 6), bit_sets, st.sampled_from([0, 1, 2]), seeds, st.booleans())
def test_the_solver_finds_what_brute_force_finds(n, bits, floor, seed, ties):
    draw = np.random.default_rng(seed)
    cost = (
        draw.integers(0, 4, (n, len(bits))).astype(float) if ties else draw.random((n, len(bits)))
    )
    every = feasible(n, bits, floor)
    if not every:
        with pytest.raises(RecipeError, match="too few experts"):
            pmq.solve([1] * n, [1] * n, cost, n * max(bits), bits, **PLAIN, floor=floor)
        return
    least = min(map(sum, every))
    for total in range(least - 2, n * max(bits) + 2):
        if total < least:
            with pytest.raises(RecipeError, match=f"the least is {least}$"):
                pmq.solve([1] * n, [1] * n, cost, total, bits, **PLAIN, floor=floor)
            continue
        within = [a for a in every if sum(a) <= total]
        # ties: the lower total, then more bits for earlier experts
        best = min(within, key=lambda a: (price(cost, bits, a), sum(a), [-b for b in a]))
        assert pmq.solve([1] * n, [1] * n, cost, total, bits, **PLAIN, floor=floor) == best


@given(seeds, st.integers(2, 8), st.randoms(use_true_random=False))
def test_renaming_experts_renames_their_bits(seed, n, lot):
    draw = np.random.default_rng(seed)
    count, mass, error = draw.random(n), draw.random(n), draw.random((n, 3))
    order = lot.sample(range(n), n)
    bits = pmq.solve(count, mass, error, 2 * n + 1)
    renamed = pmq.solve(count[order], mass[order], error[order], 2 * n + 1)
    assert renamed == tuple(bits[e] for e in order)


def stats_of(costs: Sequence[np.ndarray], options: pmq.Options) -> dict[int, dict[str, Any]]:
    """Statistics whose cost is `costs`, by layer."""
    ones = [torch.ones(len(c), dtype=torch.float64) for c in costs]
    name = pmq.trial(options).name
    return {
        i: {"count": one, "mass": one, name: torch.from_numpy(c)}
        for i, (one, c) in enumerate(zip(ones, costs, strict=True))
    }


@given(seeds, st.sampled_from([0, 1]), st.sampled_from([1, 1.5, 5 / 3, 2, 2.5, 3]))
def test_a_budget_of_the_model_finds_what_brute_force_over_all_layers_finds(seed, floor, mean):
    draw = np.random.default_rng(seed)
    costs = [draw.random((3, 3)) for _ in range(2)]
    options = pmq.Options(alpha=0.0, beta=0.0, floor=floor, budget="model")
    layers, total = feasible(3, options.bits, floor), int(mean * 6 + 1e-9)
    within = [(a, b) for a in layers for b in layers if sum(a) + sum(b) <= total]
    if not within:
        with pytest.raises(RecipeError, match=f"the least is {2 * min(map(sum, layers))}$"):
            pmq.allocate(stats_of(costs, options), mean, options)
        return
    best = min(within, key=lambda ab: sum(map(price, costs, [(1, 2, 3)] * 2, ab)))
    assert pmq.allocate(stats_of(costs, options), mean, options) == dict(enumerate(best))


@given(seeds)
def test_a_budget_of_the_model_never_costs_more_than_the_same_for_each_layer(seed):
    draw = np.random.default_rng(seed)
    costs = [draw.random((n, 3)) for n in (4, 8, 4)]  # layers may differ in size
    shared = pmq.Options(alpha=0.0, beta=0.0, budget="model")
    found = {}
    for options in (shared, pmq.Options(alpha=0.0, beta=0.0)):
        given_bits = pmq.allocate(stats_of(costs, options), 2.25, options)
        found[options.budget] = sum(price(costs[i], (1, 2, 3), b) for i, b in given_bits.items())
        assert sum(map(sum, given_bits.values())) <= 2.25 * 16
    assert found["model"] <= found["layer"]


def test_more_bits_than_the_widest_class_are_refused():
    options = pmq.Options()
    with pytest.raises(RecipeError, match=r"3\.5 bits.*the widest .* is 3"):
        pmq.allocate(stats_of([np.ones((4, 3))], options), 3.5, options)


@tiny.every_family
def test_every_token_counts_once_for_each_expert_it_is_sent_to(name, checkpoint):
    batches = tiny.tokens(3)
    streamed = tiny.stream(checkpoint(name))
    sums = dict(collect(streamed, batches, (COUNT, MASS)))
    n = sum(b.numel() for b in batches)
    for i, s in sums.items():
        assert s["count"].sum() == streamed.moe(i).router.top_k * n
        assert (s["mass"] <= s["count"]).all()


@pytest.mark.parametrize("clip", ["none", "wide"])
def test_the_error_of_one_expert_is_that_of_the_whole_block(clip, checkpoint):
    batches = tiny.tokens(3)
    options = pmq.Options(bits=(1, 3), group=16, clip=clip)
    trial = pmq.trial(options)
    streamed = tiny.stream(checkpoint("mixtral"), torch.float64)
    sums = dict(collect(streamed, batches, (trial,)))
    seen = tiny.stream(checkpoint("mixtral"), torch.float64)
    for step in walk(seen, batches):
        want = block_errors(step, seen.moe(step.index), options)
        torch.testing.assert_close(sums[step.index][trial.name], want, rtol=1e-9, atol=0)


@torch.no_grad()
def block_errors(step: Any, moe: Any, options: pmq.Options) -> torch.Tensor:
    """[E, bits]: norms of what changes in the block's output, batch by batch, all experts run."""
    inputs, original = [], experts_of(moe.experts)
    handle = moe.block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    step.run()
    handle.remove()
    clean = [moe.block(x) for x in inputs]
    out = torch.zeros(len(original), len(options.bits), dtype=torch.float64)
    for e, (k, b) in itertools.product(range(len(original)), enumerate(options.bits)):
        up, down = original.gate_up.clone(), original.down.clone()
        for w in (up, down):
            w[e] = quantized(w[e], b, options.group, CLIPS[options.clip])
        put_experts(moe.experts, type(original)(up, down, original.gate))
        out[e, k] = sum((moe.block(x) - z).norm() for x, z in zip(inputs, clean, strict=True))
    put_experts(moe.experts, original)
    return out
