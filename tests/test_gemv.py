"""Triton's products with packed weights: on a GPU, or interpreted on the CPU where there is none."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is made for Linux")

from moecule import dense, forward, gpu, runtime
from moecule.kernels import activations, gemv, grouped_int8, routing, unpack
from moecule.kernels.combine import combined
from moecule.kernels.grouped import CUTS, arranged, grouped
from moecule.kernels.matrices import Matrices
from moecule.kernels.sort import sorted_pairs
from moecule.order import with_order
from moecule.packed import Packed, pack
from moecule.plan import Keep

pytestmark = [
    # the interpreter's, of loop bounds
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim"),
    # of rows that nobody wrote and nobody reads
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = (2, 1, 3, 8, 4)
# the interpreter knows no bfloat16
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
WIDE = 1056 if DEVICE == "cuda" else 544  # columns: more than one step of the loop


def random_packed(bits: int, rows: int, columns: int, group: int) -> Packed:
    """Scales of either sign."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g)
    shape = (rows, -(-columns // group))
    scale, zero = (torch.randn(shape, generator=g).half() for _ in range(2))
    halves = None if bits == 1 else (zero * 2**bits).to(DEVICE)
    words = pack(codes, bits).to(DEVICE)
    return Packed(words, scale.to(DEVICE), halves, bits, group, columns)


def matrices(weights: list[Packed]) -> Matrices:
    """As the kernels know them."""
    found = Matrices.of(weights)
    assert found is not None
    return found


def packed_linear(packed: Packed) -> Any:
    """As `runtime.prepare_model` leaves one."""
    module = nn.Linear(packed.columns, len(packed.codes), bias=False, device=DEVICE)
    runtime.prepare_weight(module, Keep(packed.bits, packed.group))
    runtime.fill_weight(module.to(DEVICE), packed)
    return module


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that nothing was written to hold NaN, or a number that spoils a sum."""
    plain = torch.empty

    def empty(*shape: int, **how: object) -> Tensor:
        made = plain(*shape, **how)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are interpreted: one that reads or writes outside of all tensors fails."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    plain = interpreter._interpreter

    known = np.zeros((2, 0), np.int64)  # where storages begin, rising, and end

    def is_inside(at: np.ndarray, size: int) -> bool:
        if not known.size:
            return not at.size
        which = np.searchsorted(known[0], at, side="right") - 1
        return bool(((which >= 0) & (at + size <= known[1][which])).all())

    def check(places: np.ndarray, mask: np.ndarray, size: int) -> None:
        nonlocal known
        at = places[np.broadcast_to(mask, places.shape).astype(bool)].astype(np.int64)
        if not is_inside(at, size):  # tensors may have come since
            found = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
            pairs = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in found if s.nbytes()})
            known = np.array(pairs, np.int64).T
            assert is_inside(at, size), "outside of all tensors"

    def load(places: np.ndarray, mask: np.ndarray, other: np.ndarray, kind: np.dtype) -> np.ndarray:
        check(places, mask, np.dtype(kind).itemsize)
        return plain.load(places, mask, other, kind)

    def store(places: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        check(places, mask, value.dtype.itemsize)
        plain.store(places, value, mask)

    fence = SimpleNamespace(**{**vars(plain), "load": load, "store": store})
    monkeypatch.setattr(interpreter, "_interpreter", fence)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("columns", "group", "cut"),
    [(WIDE, 64, gemv.Tiling(words=32)), (200, 128, gemv.Tiling(rows=16)), (96, 32, gemv.Tiling()),
     (2080, 1024, gemv.Tiling(words=256, warps=4))],
)  # fmt: skip
def test_widths_mix_in_one_launch(columns, group, cut, exact, monkeypatch, fenced):
    poisoned(monkeypatch)
    weights = [random_packed(bits, 21, columns, group) for bits in MIXED]
    of, x = matrices(weights), tiny.in_eighths((2, columns), 0).to(DEVICE)
    idx = torch.tensor([0, 1, 5, 4, 3, 2], device=DEVICE)  # 5 is nobody: skipped
    given = x if exact else activations.rounded(x, of)
    each = gemv.products(given, of, idx, 3, cut=cut)
    for pair, e in enumerate(idx.tolist()):
        if e == len(of):
            assert not each[pair].any()
            continue
        plain = weights[e].dequantize().double()
        at = x[pair // 3].double()
        zeros = 2.0 ** (MIXED[e] + 2) * weights[e].scale.double().abs()
        wide = zeros.repeat_interleave(min(group, columns), 1)[:, :columns]
        most = (plain.abs() + wide) @ at.abs()
        assert ((each[pair] - plain @ at).abs() <= 3e-6 * most).all()
    # a token's pairs together
    coef = tiny.normal(2, 3).to(DEVICE)
    both = combined(each, idx.view(2, 3), coef, len(of), torch.float32)
    want = (each.view(2, 3, -1) * coef[..., None]).sum(1)
    assert (both - want).norm() < 1e-6 * each.norm()


def test_whole_numbers_come_out_exactly(coarse):
    for exact in (True, False):
        for bits in range(1, 9):
            codes = torch.randint(0, 2**bits, (9, 160), generator=torch.Generator().manual_seed(0))
            ones = torch.ones(9, 5, device=DEVICE).half()
            zero = None if bits == 1 else 3 * ones
            packed = Packed(pack(codes, bits).to(DEVICE), 2 * ones, zero, bits, 32, 160)
            x = tiny.in_eighths((2, 160), 0).to(DEVICE)
            want = (x.double() @ packed.dequantize().double().mT).float()
            module = packed_linear(packed)
            module.exact = exact
            assert torch.equal(dense.linear(module, x, dense.weight_there(module)), want)


@pytest.mark.parametrize("exact", [False, True])
def test_many_rows_are_multiplied_by_tiles(exact, monkeypatch, fenced):
    monkeypatch.setattr(dense, "WIDE", 70)
    ways: list[bool] = []
    plain = dense.tiled
    monkeypatch.setattr(
        dense, "tiled", lambda *a, exact: ways.append(exact) or plain(*a, exact=exact)
    )
    packed = random_packed(4, 70, 96, 32)
    module = packed_linear(packed)
    module.exact = exact
    x = tiny.in_eighths((2, 1, 96), 0).to(DEVICE).half()
    have = dense.linear(module, x, dense.weight_there(module)).double()
    want = x.view(2, 96).double() @ packed.dequantize().double().mT
    assert ways == [exact]
    assert (have - want).norm() < (1e-3 if exact else 1e-2) * want.norm()
    dense.linear(module, x[:1], dense.weight_there(module))  # a token alone is not
    assert ways == [exact]


def test_linears_that_share_an_input_are_multiplied_at_once(coarse):
    """To the same bits, in any order of calls, and not before they were seen to share one."""
    shared = dense.Peers()
    modules = [packed_linear(random_packed(4, rows, 64, 32)) for rows in (16, 8, 8, 24)]
    x, other = (tiny.in_eighths((2, 64), i).to(DEVICE) for i in range(2))
    for exact in (True, False):
        for m in modules:
            m.exact, m.peers = exact, None
        want = [dense.linear(m, x, dense.weight_there(m)) for m in modules]
        last = dense.linear(modules[3], other, dense.weight_there(modules[3]))
        for m in modules:
            m.peers = shared
        for order in ((0, 1, 2), (1, 0, 2), (2, 1)):
            for i in order:
                have = dense.linear(modules[i], x, dense.weight_there(modules[i]))
                assert torch.equal(have, want[i])
            have = dense.linear(modules[3], other, dense.weight_there(modules[3]))
            assert torch.equal(have, last)
    assert shared.members == modules[:3]
    assert len(shared.all[0]) == 4  # pieces of 8 rows
    modules[1].weight_codes = modules[1].weight_codes.clone()  # as moving a model does
    modules[1].weight_codes.bitwise_not_()
    changed = dense.linear(modules[1], x, dense.weight_there(modules[1]))
    modules[1].peers = None
    assert torch.equal(changed, dense.linear(modules[1], x, dense.weight_there(modules[1])))
    assert not torch.equal(changed, want[1])
    copied = copy.deepcopy(modules[0])
    assert copied.peers.members == [] and copied.there is None
    have = dense.linear(copied, x, dense.weight_there(copied))
    assert torch.equal(have, want[0]) and copied.span is None


def test_what_was_made_for_peers_goes_with_its_input(coarse):
    """Nothing is handed out for an input that was changed in place, or kept when all have it."""
    shared = dense.Peers()
    modules = [packed_linear(random_packed(4, 16, 64, 32)) for _ in range(3)]
    x = tiny.in_eighths((2, 64), 0).to(DEVICE)

    def of(i: int) -> Tensor:
        return dense.linear(modules[i], x, dense.weight_there(modules[i]))

    for m in modules:
        m.exact = False
    plain = of(0)
    for m in modules:
        m.peers = shared
    assert torch.equal(of(0), plain) and torch.equal(of(0), plain)
    assert shared.members == []  # one module, twice
    for _ in range(2):  # they are known to share from the second on
        x = x.clone()
        for i in (0, 1, 2):
            assert torch.equal(of(i), plain)
    assert shared.made is None
    assert torch.equal(of(0), plain) and shared.made is not None
    x.mul_(2)
    for i in (1, 2):
        assert torch.equal(of(i), 2 * plain)
    long = x.repeat(dense.FEW_TOKENS, 1)
    dense.linear(modules[0], long, dense.weight_there(modules[0]))
    assert shared.made is None


@pytest.mark.parametrize(("columns", "group"), [(200, 128), (64, 32)])
def test_unpacking_is_the_reference_bit_for_bit(columns, group, fenced):
    weights = [random_packed(bits, 11, columns, group) for bits in range(1, 9)]
    for e, w in enumerate(weights):
        have = unpack.unpacked(matrices(weights), e, torch.float32)
        assert torch.equal(have.view(torch.int32), w.dequantize().view(torch.int32))


def test_groups_that_the_kernels_cannot_tell_apart_are_not_served():
    assert Matrices.of([random_packed(2, 4, 96, 24)]) is None
    assert Matrices.of([random_packed(2, 4, 96, 32), random_packed(2, 4, 96, 64)]) is None
    assert Matrices.of([random_packed(2, 4, 96, 500)]).group == 128  # all columns are one group


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_largest_scores_are_picked(dtype, fenced):
    """As torch does, of equal ones the first; what is minus infinity comes last, each once."""
    x = tiny.in_eighths((3, 200), 0).to(DEVICE, dtype)
    x[1, 3:] = float("-inf")
    values, where = routing.picked(x, 8)
    order = x.float().argsort(descending=True, stable=True)[:, :8]
    assert torch.equal(where, order)
    assert torch.equal(values, x.gather(1, order))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("rows", "columns"), [(5, 200), (640, 1100)])
def test_thin_products_are_those_of_torch(rows, columns, dtype, fenced):
    x, w = tiny.in_eighths((2, columns), 0), tiny.in_eighths((rows, columns), 1)
    have = routing.thin(x.to(DEVICE, dtype), w.to(DEVICE, dtype))
    torch.testing.assert_close(
        have, (x @ w.T).to(DEVICE, dtype), rtol=EPS.get(dtype, 1e-6), atol=1e-5
    )


def test_sorted_pairs_are_cut_into_tiles_of_one_expert():
    idx = torch.tensor([2, 0, 5, 2, 2, 5, 0, 4] * 12, device=DEVICE)  # 5 is nobody
    found = sorted_pairs(idx, 5, CUTS)
    seen = []
    for e, first, count in found.tiles.tolist():
        pairs = found.order[first : first + count]
        assert count <= found.tokens and (idx[pairs] == e).all()
        assert (pairs.diff() > 0).all()  # in their order
        seen += pairs.tolist()
    assert sorted(seen) == (idx != 5).nonzero().flatten().tolist()
    assert torch.equal(found.order[found.places], torch.arange(len(idx), device=DEVICE))


@pytest.mark.parametrize("tokens", [1, 7, 60])
@pytest.mark.parametrize(("columns", "group"), [(200, 128), (96, 32), (288, 64)])
@pytest.mark.parametrize("dtype", HALVES)
def test_grouped_products_are_those_of_unpacked_weights(
    columns, group, tokens, dtype, fenced, monkeypatch
):
    poisoned(monkeypatch)
    widths = (*MIXED, 7)
    n = len(widths)
    weights = [random_packed(bits, 21, columns, group) for bits in widths]
    of, x = matrices(weights), tiny.normal(tokens, columns).to(DEVICE, dtype)
    g = torch.Generator().manual_seed(0)
    idx = torch.stack([torch.randperm(n + 1, generator=g)[:2] for _ in range(tokens)]).to(DEVICE)
    pairs = sorted_pairs(idx.flatten(), n, CUTS)
    y = grouped(arranged(x, of), pairs.order // 2, of, pairs)
    for place, pair in enumerate(pairs.order.tolist()):
        e = int(idx.flatten()[pair])
        if e == n:
            assert y[place].isnan().all()  # not a row of it was computed
            continue
        plain, at = weights[e].dequantize().double(), x[pair // 2].double()
        zeros = 2.0 ** (widths[e] + 2) * weights[e].scale.double().abs()
        wide = zeros.repeat_interleave(min(group, columns), 1)[:, :columns]
        error = (y[place] - plain @ at).abs()
        assert (error <= 2e-5 * (plain.abs() + wide) @ at.abs() + EPS[dtype] * y[place].abs()).all()


@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize(("columns", "group"), [(200, 128), (96, 32), (288, 64), (288, 256)])
def test_grouped_products_of_rounded_activations(columns, group, tokens, fenced, monkeypatch):
    """Beside the same sums in float64, of activations rounded as they are."""
    poisoned(monkeypatch)
    widths = (*MIXED, 7)
    n, step = len(widths), min(128, group)
    weights = [random_packed(bits, 70, columns, group) for bits in widths]
    of, x = matrices(weights), tiny.normal(tokens, columns).to(DEVICE)
    padded = torch.nn.functional.pad(x, (0, -columns % step)).unflatten(1, (-1, step))
    d = padded.abs().amax(-1, keepdim=True) / 127
    rounded = ((padded / d).round() * d).flatten(1)[:, :columns].double()
    g = torch.Generator().manual_seed(0)
    idx = torch.stack([torch.randperm(n + 1, generator=g)[:2] for _ in range(tokens)]).to(DEVICE)
    pairs = sorted_pairs(idx.flatten(), n, grouped_int8.CUTS)
    given = grouped_int8.tiled(x, pairs.order // 2, of, pairs)
    y = grouped_int8.products(given, of, pairs, torch.float32)
    for pair, place in enumerate(pairs.places.tolist()):
        e = int(idx.flatten()[pair])
        if e == n:
            assert y[place].isnan().all()  # not a row of it was computed
            continue
        plain, at = weights[e].dequantize().double(), rounded[pair // 2]
        zeros = 2.0 ** (widths[e] + 2) * weights[e].scale.double().abs()
        wide = zeros.repeat_interleave(min(group, columns), 1)[:, :columns]
        most = (plain.abs() + wide) @ at.abs()
        assert ((y[place] - plain @ at).abs() <= 1e-5 * most).all()


def test_grouped_products_of_whole_numbers_are_exact():
    """As many tokens as one tile holds, for every width: no error hides behind rounding."""
    for dtype in HALVES:
        for bits in range(1, 9):
            g = torch.Generator().manual_seed(bits)
            codes = torch.randint(0, 2**bits, (130, 288), generator=g)
            ones = torch.ones(130, 9, device=DEVICE).half()
            zero = None if bits == 1 else ones
            packed = Packed(pack(codes, bits).to(DEVICE), 2 * ones, zero, bits, 32, 288)
            for tokens in (3, 40, 130) if DEVICE == "cuda" else (3,):
                x = torch.randint(-1, 2, (tokens, 288), generator=g) * (
                    torch.rand(tokens, 288, generator=g) < 0.03
                )
                x, nought = x.to(DEVICE, dtype), torch.zeros(tokens, dtype=torch.int64)
                of = matrices([packed])
                pairs = sorted_pairs(nought.to(DEVICE), 1, CUTS)
                y = grouped(arranged(x, of), pairs.order, of, pairs)
                want = x.double() @ packed.dequantize().double().mT
                assert torch.equal(y, want[pairs.order].to(dtype))


WAYS = ("exact", "int8", "grouped", "grouped int8", "unpacked")


@pytest.mark.parametrize(
    ("name", "how"),
    [*(("mixtral", how) for how in WAYS), ("gpt_oss", "int8"), ("gpt_oss", "grouped int8"),
     ("nemotron_h", "exact"), ("nemotron_h", "grouped"), ("nemotron_h", "unpacked")],
)  # fmt: skip
def test_experts_do_what_torch_makes_of_them(name, how, checkpoint, tmp_path, monkeypatch, coarse):
    monkeypatch.setattr(gpu, "FEW_PAIRS", 1000 if how in ("exact", "int8") else 0)
    streamed = tiny.stream(checkpoint(name))
    plan = tiny.plan(streamed, lambda i, e: Keep(MIXED[e % len(MIXED)], 32))
    tiny.write(streamed, plan, tmp_path / "out", tiny.tokens(2))
    model = tiny.load(tmp_path / "out").to(DEVICE)
    module = next(m for m in model.modules() if hasattr(m, "slots"))
    n = module.num_experts
    hidden = tiny.normal(3, module.packed[module.slots[0][0]].shapes["gate_up"][1]).to(DEVICE)
    idx = torch.tensor([[0, 1], [n - 1, 0], [1, n]], device=DEVICE)  # n is nobody
    coef = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1]], device=DEVICE)
    with torch.no_grad():
        found = gpu.experts_there(module)
        assert found is not None
        want = forward.packed_forward(module, hidden, idx, coef)
        module.exact = "int8" not in how
        if "grouped" in how:
            module, hidden, coef = module.half(), hidden.half(), coef.half()
        got = gpu.experts_forward(module, *found, hidden, idx, coef)
    if how in ("int8", "grouped", "grouped int8"):
        assert 0 < (got - want).norm() / want.norm() < (0.02 if "int8" in how else 0.002)
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("few", [1000, 0])
def test_pieces_of_experts_add_up(few, checkpoint, tmp_path, monkeypatch, coarse):
    """By codes read anew for every pair, and unpacked first."""
    streamed = tiny.stream(checkpoint("mixtral"))
    plan = tiny.plan(streamed, lambda i, e: Keep.in_pieces((3, 1) if e % 2 else (2, 1), 32))
    order = {
        i: torch.arange(15, -1, -1).expand(n, 16).int()
        for i, n in tiny.moe_layers(streamed).items()
    }
    tiny.write(streamed, with_order(plan, order), tmp_path / "out", tiny.tokens(2))
    model = tiny.load(tmp_path / "out").to(DEVICE)
    module = next(m for m in model.modules() if hasattr(m, "slots"))
    hidden = tiny.normal(3, 32).to(DEVICE)
    idx = torch.tensor([[0, 1], [7, 0], [1, 8]], device=DEVICE)  # 8 is nobody
    coef = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1]], device=DEVICE)
    with torch.no_grad():
        monkeypatch.setattr(forward, "GPU", None)
        want = forward.packed_forward(module, hidden, idx, coef)
        monkeypatch.setattr(forward, "GPU", gpu)
        monkeypatch.setattr(forward, "_on_gpu", lambda *x: True)
        monkeypatch.setattr(gpu, "FEW_PAIRS", few)
        got = forward.packed_forward(module, hidden, idx, coef)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class OnGpu(Tensor):
    """Says that it lies there."""

    is_cuda = True


def test_kernels_give_way_where_a_gradient_is_wanted(monkeypatch):
    """Of hidden states, or of a router's coefficients alone."""
    monkeypatch.setattr(forward, "GPU", gpu)
    plain, wanted = (torch.zeros(2, requires_grad=g).as_subclass(OnGpu) for g in (False, True))
    assert forward._on_gpu(plain) and forward._on_gpu(plain, plain)
    assert not forward._on_gpu(wanted) and not forward._on_gpu(plain, wanted)
    assert not forward._on_gpu(torch.zeros(2))
    with torch.no_grad():
        assert forward._on_gpu(wanted, wanted)


@pytest.mark.parametrize("rule", [(), pytest.param(("masks",), marks=pytest.mark.slow)])
def test_a_compiler_takes_a_decoding_step_whole(rule, tmp_path):
    """One graph for all steps, the same logits, and the same pairs skipped and counted."""
    script = Path(__file__).with_name("traced.py")
    run = subprocess.run(
        [sys.executable, script, "mixtral", tmp_path, *rule], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["graphs"] == 1
    assert found["operators"] == ["combined", "gated", "picked", "products", "rounded", "thin"]
    assert found["off_by"] < 1e-5
    assert found["run"][0] == found["run"][1] < 1


@pytest.mark.slow
def test_a_compiler_takes_grouped_products_too(tmp_path):
    script = Path(__file__).with_name("traced.py")
    run = subprocess.run(
        [sys.executable, script, "mixtral", tmp_path, "many"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["graphs"] == 2  # one for each kind of activations
    assert found["off_by"] < 1e-3
    assert {"arranged", "grouped", "grouped_int8", "sorted", "tiled"} < {*found["operators"]}


def test_nothing_spills_on_an_h100():
    """Few tokens: codes come 16 bytes at a time, four of them multiplied by an instruction."""
    script = Path(__file__).with_name("compiled.py")
    plain = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=plain)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert all(kernel["stack"] < 64 for kernel in found.values())
    held = found.pop("held")
    assert held["registers"] <= 128 and held["early"] >= 32
    for name in ("up", "down"):
        few = found.pop(name)
        assert few["registers"] <= 128  # 16 warps on a multiprocessor
        for loop in few["loops"]:
            assert loop["instructions_a_weight"] < 1.7
            assert loop["wide_loads"] >= 4
    for kernel in found.values():  # codes go to the matrix units straight from registers
        (loop,) = kernel["loops"]
        assert loop["instructions_a_weight"] < 6
        assert loop["matrix_products"] and loop["stores"] <= 1
