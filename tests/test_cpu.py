"""The C kernel: exact on the stored bytes in every form, and the same model with it and without."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moecule import forward, runtime
from moecule.kernels import cpu
from moecule.packed import Packed, pack
from moecule.plan import Keep

LIBRARY = cpu.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there is no C compiler")
FORMS = [f for f, n in cpu.FORMS.items() if LIBRARY is not None and n <= LIBRARY.best()]
a_form = pytest.mark.parametrize("form", FORMS)
bits_of = st.integers(1, 8)
rows_of = st.sampled_from([1, 3, 4, 33, 70])
columns_of = st.sampled_from([1, 7, 31, 32, 33, 64, 96, 200])
group_of = st.sampled_from([3, 16, 24, 32, 64, 128, 500])


def random_packed(bits: int, rows: int, columns: int, group: int, seed: int) -> Packed:
    """Scales down to those that have no exponent of their own, and of either sign."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g)
    shape = (rows, -(-columns // group))
    scale = torch.randn(shape, generator=g) * 10 ** torch.randint(-8, 1, shape, generator=g)
    zero = torch.randn(shape, generator=g) * 2**bits
    halves = None if bits == 1 else zero.half()
    return Packed(pack(codes, bits), scale.half(), halves, bits, group, columns)


@a_form
@given(bits_of, rows_of, columns_of, group_of, st.integers(0, 99))
def test_unpacking_is_the_reference_bit_for_bit(form, bits, rows, columns, group, seed):
    packed = random_packed(bits, rows, columns, group, seed)
    got, want = cpu.dequantize(packed, form), packed.dequantize()
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))  # -0 is not 0


@a_form
@given(bits_of, rows_of, columns_of, group_of, st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_products_are_the_references_to_rounding(form, bits, rows, columns, group, counts):
    weights = [random_packed(bits, rows, columns, group, seed) for seed in range(len(counts))]
    x = tiny.normal(sum(counts), columns)
    got = cpu.multiply([cpu.Job.of(w) for w in weights], x, counts, rows, form=form)
    for y, part, w in zip(got.split(counts), x.split(counts), weights, strict=True):
        exact = w.dequantize().double()
        want, most = part.double() @ exact.mT, part.abs().double() @ exact.abs().mT
        assert ((y - want).abs() <= 1e-6 * most + 1e-30).all()


@a_form
def test_whole_numbers_come_out_exactly(form):
    g = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (37, 160), generator=g)
        ones = torch.ones(37, 5).half()
        packed = Packed(pack(codes, bits), 2 * ones, None if bits == 1 else 3 * ones, bits, 32, 160)
        x = torch.randint(-4, 5, (6, 160), generator=g).float()
        want = x @ packed.dequantize().mT
        assert torch.equal(cpu.multiply([cpu.Job.of(packed)], x, [6], 37, form=form), want)


def test_widths_mix_in_one_call():
    weights = [random_packed(bits, 40, 96, 32, bits) for bits in (3, 1, 8, 2)]
    x = tiny.normal(7, 96)
    counts = [1, 4, 0, 2]
    got = cpu.multiply([cpu.Job.of(w) for w in weights], x, counts, 40).split(counts)
    for y, part, w, n in zip(got, x.split(counts), weights, counts, strict=True):
        alone = cpu.multiply([cpu.Job.of(w)], part, [n], 40)
        assert torch.equal(y, alone)


@pytest.mark.parametrize("exact", [True, False])
def test_threads_change_no_bit(exact):
    packed, x = random_packed(3, 300, 200, 64, 0), tiny.normal(5, 200)
    outs = []
    for n in (1, 2):
        torch.set_num_threads(n)
        outs.append(cpu.multiply([cpu.Job.of(packed)], x, [5], 300, exact=exact))
    torch.set_num_threads(1)
    assert torch.equal(*outs)


@given(
    bits_of,
    rows_of,
    st.sampled_from([1, 31, 32, 64, 200, 513, 1100]),
    st.sampled_from([32, 64, 128, 1024]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_rounded_activations_give_what_they_stand_for(bits, rows, columns, group, counts):
    weights = [random_packed(bits, rows, columns, group, seed) for seed in range(len(counts))]
    x = tiny.in_eighths((sum(counts), columns), 0)
    jobs = [cpu.Job.of(w) for w in weights]
    got = cpu.multiply(jobs, x, counts, rows, exact=False)
    for y, part, w in zip(got.split(counts), x.split(counts), weights, strict=True):
        exact = w.dequantize().double()
        zeros = 2.0 ** (bits + 2) * w.scale.double().abs().repeat_interleave(group, 1)[:, :columns]
        want, most = part.double() @ exact.mT, part.abs().double() @ (exact.abs() + zeros).mT
        assert ((y - want).abs() <= 3e-6 * most + 1e-30).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_rounding_activations_costs_less_than_two_percent(bits):
    packed, x = random_packed(bits, 64, 1024, 64, bits), tiny.normal(4, 1024)
    jobs = [cpu.Job.of(packed)]
    rounded, exact = (cpu.multiply(jobs, x, [4], 64, exact=how) for how in (False, True))
    off = float((rounded - exact).norm() / exact.norm())
    assert off < 0.02
    assert off > 0 or not LIBRARY.fast()  # it is another path


def test_activations_that_are_all_zero_stay_so():
    packed = random_packed(3, 9, 96, 32, 0)
    x = torch.zeros(2, 96)
    assert not cpu.multiply([cpu.Job.of(packed)], x, [2], 9, exact=False).any()


def test_odd_groups_are_computed_exactly():
    packed, x = random_packed(3, 9, 96, 24, 0), tiny.normal(2, 96)
    jobs = [cpu.Job.of(packed)]
    assert torch.equal(*(cpu.multiply(jobs, x, [2], 9, exact=how) for how in (False, True)))


@pytest.mark.parametrize("tokens", [1, cpu.FEW, cpu.FEW + 1, 100])
def test_many_tokens_and_few_give_the_same(tokens, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 4 * 96 * 7)  # several blocks of seven rows
    packed, x = random_packed(2, 40, 96, 32, 0), tiny.normal(tokens, 96)
    exact = packed.dequantize().double()
    want, most = x.double() @ exact.mT, x.abs().double() @ exact.abs().mT
    assert ((cpu.linear(x, packed) - want).abs() <= 1e-6 * most).all()


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel."""
    monkeypatch.setattr(cpu, "library", lambda: None)


def mixed(layer: int, expert: int) -> Keep:
    return (Keep(2, 16), Keep(3, 16), Keep(1, 16), Keep(16))[(layer + expert) % 4]


@tiny.every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_the_same_without_it(name, dtype, checkpoint, tmp_path, monkeypatch):
    streamed, batches = tiny.stream(checkpoint(name)), tiny.tokens(1)
    rest = dict.fromkeys(("attention", "shared"), Keep(4, 16))
    tiny.write(streamed, tiny.plan(streamed, mixed, rest=rest), tmp_path, batches)
    model, run = tiny.load(tmp_path, dtype), []
    called = cpu.multiply
    monkeypatch.setattr(cpu, "multiply", lambda *args, **how: run.append(1) or called(*args, **how))
    for batch in (batches[0], batches[0][:1, :1]):  # many tokens an expert, and one
        run.clear()
        with torch.no_grad():
            ours = tiny.logits(model, batch)
            assert run
            with pytest.MonkeyPatch.context() as patch:
                plain(patch)
                theirs = tiny.logits(model, batch)
        if dtype == torch.float32:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        else:  # sums are in float32 here and in bfloat16 there, and some tokens go to other experts
            off = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
            assert off.median() < 0.05


def test_models_are_exact_until_told_otherwise(checkpoint, tmp_path):
    streamed, batches = tiny.stream(checkpoint("qwen3_moe")), tiny.tokens(1)
    fate = Keep(3, 32)
    rest = {"attention": Keep(4, 32)}
    tiny.write(streamed, tiny.plan(streamed, lambda i, e: fate, rest=rest), tmp_path, batches)
    model, one = tiny.load(tmp_path), batches[0][:1, :2]
    first = tiny.logits(model, one)
    runtime.set_exact(model, False)
    rounded = tiny.logits(model, one)
    runtime.set_exact(model, True)
    assert torch.equal(tiny.logits(model, one), first)
    assert torch.equal(rounded, first) == (not LIBRARY.fast())
    assert (rounded - first).norm() < 0.5 * first.norm()  # a token may go to another expert


def test_a_linear_keeps_its_shape_and_bias():
    torch.manual_seed(0)
    layer = nn.Linear(48, 20)
    packed = random_packed(4, 20, 48, 16, 0)
    bias = layer.bias.data.clone()
    runtime.prepare_weight(layer, Keep(4, 16))
    runtime.fill_weight(layer, packed)
    x = tiny.normal(2, 3, 48)
    with torch.no_grad():
        want = x @ packed.dequantize().mT + bias
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
        assert layer(x[:, :0]).shape == (2, 0, 20)


def test_gradients_pass_through_packed_weights():
    layer = nn.Linear(32, 8, bias=False)
    packed = random_packed(3, 8, 32, 16, 0)
    runtime.prepare_weight(layer, Keep(3, 16))
    runtime.fill_weight(layer, packed)
    x = tiny.normal(1, 32).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    want = packed.dequantize().sum(0, keepdim=True)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_plain_torch_runs_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.cache_clear()
    packed, x = random_packed(3, 5, 64, 32, 0), tiny.normal(2, 64)
    try:
        with pytest.warns(UserWarning, match="plain torch.*no-such-compiler.*install a C compiler"):
            got = forward.times(x, packed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = forward.times(x, packed)
    finally:
        cpu.library.cache_clear()
    want: Tensor = x @ packed.dequantize().mT
    assert torch.equal(got, again)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot be compiled"):
            assert cpu.library() is None
    finally:
        cpu.library.cache_clear()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
