"""Experts on the host with a cache of some: tables point to the right bytes whatever comes and goes.

Without a GPU host and device are the same memory, and kernels are interpreted; the rest is as it is there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecule import forward, generate, offload, runtime
from moecule.errors import RecipeError
from moecule.moe import experts_in
from moecule.plan import Keep
from moecule.session import Compute

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = (3, 1, 2, 8)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is made for Linux"
)
pytestmark = [
    # the interpreter's, of loop bounds, and of rows that nobody reads
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]
amounts = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=24)


@given(amounts, st.integers(0, 60), st.lists(st.lists(st.integers(0, 9)), max_size=6))
def test_what_is_held_fits_and_is_hotter_than_what_is_not(experts, room, rounds):
    sizes = torch.tensor([size for size, _ in experts])
    heat = torch.tensor([float(uses) for _, uses in experts], dtype=torch.float64)
    at: dict[int, int] = {}
    for counts in [[], *rounds]:
        heat[: len(counts)] += torch.tensor(counts[: len(heat)], dtype=torch.float64)
        before = dict(at)
        leave, into = offload.swaps(heat, sizes, at, room)
        assert set(leave) <= set(at) and not set(into) & set(at)
        for i in leave:
            del at[i]
        at |= into
        extents = sorted((start, start + int(sizes[i])) for i, start in at.items())
        assert all(a >= 0 and b <= room for a, b in extents)
        assert all(b <= c for (_, b), (c, _) in zip(extents, extents[1:], strict=False))
        for i in into:  # nobody leaves for one who is not clearly hotter
            assert heat[i] > 0
            assert all(heat[i] >= offload.STAY * (heat[j] + 1) for j in leave)
        assert leave == [] or into
        if sizes.unique().numel() == 1 and room // int(sizes[0]) < len(sizes):
            rest = [i for i in range(len(sizes)) if i not in at]
            assert all(
                heat[i] <= offload.STAY * (heat[j] + 1) or i in before for i in rest for j in at
            )
            full = len(at) == room // int(sizes[0])
            assert full or all(heat[i] == 0 for i in rest)


def test_the_same_uses_again_change_nothing():
    """Nor does a little more of what is not held."""
    heat = torch.tensor([9.0, 8, 7, 6, 5, 4], dtype=torch.float64)
    sizes = torch.tensor([2, 3, 2, 3, 2, 3])
    _, at = offload.swaps(heat, sizes, {}, 7)
    assert set(at) == {0, 1, 2}
    assert offload.swaps(heat, sizes, at, 7) == ([], {})
    heat[4] = 8.9
    assert offload.swaps(heat, sizes, at, 7) == ([], {})
    heat[4] = 20
    assert offload.swaps(heat, sizes, at, 7) == ([2], {4: at[2]})


def test_a_newcomer_takes_the_place_of_several_side_by_side():
    heat = torch.tensor([1.0, 9, 1, 1, 30], dtype=torch.float64)
    sizes, at = torch.tensor([2, 2, 2, 2, 4]), {0: 0, 1: 2, 2: 4, 3: 6}
    assert offload.swaps(heat, sizes, at, 8) == ([2, 3], {4: 4})
    heat[3] = 9.0  # those that would make room are not side by side
    assert offload.swaps(heat, sizes, at, 8) == ([], {})


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(7, 11))
def test_buffers_keep_their_contents_in_blocks(lengths, power):
    stacks = []
    for i, n in enumerate(lengths):
        stack = torch.nn.Module()
        stack.register_buffer("codes", torch.arange(n, dtype=torch.int32).view(1, n))
        stack.register_buffer("scale", torch.full((2, n), i, dtype=torch.int16))
        stacks.append(torch.nn.ModuleDict({"bits3g32": stack}))
    want = [b.clone() for s in stacks for b in s.buffers()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "PINNED", 2**power)
        offload._pin(stacks, pin=False)
    have = [b for s in stacks for b in s.buffers()]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(have, want, strict=True))
    assert all(b.data_ptr() % 64 == 0 for b in have)
    blocks = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in have}
    assert all(size & (size - 1) == 0 for size in blocks.values())
    small = [n for n in lengths if 4 * n <= 2**power // 4]
    if len(small) == len(lengths):  # a block ends with at most a quarter left, but for the last
        needed = sum(offload._padded(b.nbytes) for b in have)
        assert sum(blocks.values()) <= max(2 * needed, 4 / 3 * needed + 2**power)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """folder(dense): a compressed model of experts of several widths; dense: one is of 16 bits."""
    made: dict[bool, Path] = {}

    def write(dense: bool = False) -> Path:
        if dense not in made:
            made[dense] = tmp_path_factory.mktemp("offload") / "out"
            source = tmp_path_factory.mktemp("offload") / "in"
            tiny.save("mixtral", source, num_hidden_layers=2, vocab_size=tiny.VOCABULARY)
            streamed = tiny.stream(source)
            plan = tiny.plan(
                streamed,
                lambda i, e: Keep(16 if dense and i == e == 1 else WIDTHS[(i + e) % 4], 32),
            )
            tiny.write(streamed, plan, made[dense], tiny.tokens(1))
            tiny.save_tokenizer(made[dense])
        return made[dense]

    return write


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The GPU's, on whatever there is."""
    from moecule import gpu

    monkeypatch.setattr(forward, "GPU", gpu)
    monkeypatch.setattr(forward, "_on_gpu", lambda *x: True)
    return gpu


def experts_of(model: Any) -> list[Any]:
    """The packed experts modules."""
    return [m for _, m in experts_in(model)]


def sizes_of(made: offload.Offloaded) -> int:
    """Bytes of a cache that holds all."""
    return int(made.sizes.sum())


def bytes_at(address: int, n: int, arena: torch.Tensor) -> bytes:
    """What lies there, on the host or in the arena."""
    start = address - arena.data_ptr()
    if 0 <= start < len(arena):
        return bytes(arena[start : start + n].tolist())
    return ctypes.string_at(address, n)


def check(made: offload.Offloaded, plain: list[list[bytes]]) -> None:
    """Tables lead to the experts' own bytes, in the arena for those held alone."""
    first, last = made.arena.data_ptr(), made.arena.data_ptr() + len(made.arena)
    table = made.tables.tolist()
    for i, unit in enumerate(made.units):
        addresses = [a for row in unit.rows for a in table[row][:3]]
        for address, want in zip(addresses, plain[i], strict=True):
            assert bytes_at(address, len(want), made.arena) == want
            assert (first <= address < last) == (i in made.at)


def poison(made: offload.Offloaded) -> None:
    """What nobody holds holds nonsense."""
    free = torch.ones(len(made.arena), dtype=torch.bool)
    for i, start in made.at.items():
        free[start : start + int(made.sizes[i])] = False
    made.arena[free.to(made.arena.device)] = 0xA5


@needs_triton
@pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 1.0])
def test_tables_lead_to_the_right_bytes_through_any_uses(share, folder, kernels, monkeypatch):
    model = tiny.load(folder())
    bytes_of = [p.flatten().view(torch.uint8) for m in experts_of(model) for p in m.buffers()]
    made = offload.offload(model, DEVICE, 0)
    assert made.at == {} and sum(b.numel() for b in bytes_of) == made.held().host_bytes
    room = int(share * sizes_of(made))
    made = offload.offload(model, DEVICE, room)
    plain = [[bytes(p.flatten().view(torch.uint8).tolist()) for p in u.parts] for u in made.units]
    assert len(made.arena) <= room
    full = sum(int(made.sizes[i]) for i in made.at)
    assert room - int(made.sizes.max()) < full <= room or share == 1.0 and full == room
    draw = torch.Generator().manual_seed(0)
    moved = 0
    for _ in range(30):
        poison(made)
        check(made, plain)
        before = (made.served, made.pairs, set(made.at))
        served = pairs = i = 0
        for uses in made.uses:
            hot = torch.rand(len(uses), generator=draw) ** 8 * 40
            uses += hot.int().to(DEVICE)
            for e in range(len(uses) - 1):  # the last one counts nobody's
                pairs += int(uses[e])
                served += int(uses[e]) if i in made.at else 0
                i += 1
        made.refresh()
        assert (made.served, made.pairs) == (before[0] + served, before[1] + pairs)
        assert all(not u.any() for u in made.uses)
        moved += len(set(made.at) - before[2])
    check(made, plain)
    assert moved == 0 if share in (0.0, 1.0) else moved > 10


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("how", ["int8", "exact", "many"])
def test_whatever_is_held_the_output_is_the_same_to_the_bit(how, folder, kernels, coarse):
    model = tiny.load(folder())
    runtime.set_exact(model, how != "int8")
    module = experts_of(model)[0]
    n, tokens = module.num_experts, 32 if how == "many" else 1
    hidden, idx = tiny.normal(tokens, model.config.hidden_size), torch.tensor([[0, 7]])
    if how == "many":
        draw = torch.Generator().manual_seed(1)
        idx = torch.stack([torch.randperm(n + 1, generator=draw)[:2] for _ in range(tokens)])
    given = [t.to(DEVICE) for t in (hidden, idx, torch.full((tokens, 2), 0.3))]
    model.to(DEVICE)
    want = forward.packed_forward(module, *given)
    everything = sizes_of(offload.offload(model, DEVICE, 0))
    made = offload.offload(model, DEVICE, everything // 2)
    assert 0 in made.at and 7 not in made.at
    for _ in range(2):
        poison(made)
        assert torch.equal(forward.packed_forward(module, *given), want)
        counts = idx.flatten().bincount(minlength=n + 1).int()
        assert torch.equal(made.uses[0].cpu(), counts)  # of nobody too, who is not a pair
        made.heat[7] = 100
        made.refresh()
        assert 7 in made.at
    assert made.pairs == 2 * int(counts[:-1].sum()) > made.served > 0


@needs_triton
@torch.no_grad()
def test_many_tokens_unpack_each_expert_once(folder, kernels, monkeypatch):
    model = tiny.load(folder())
    module, ways = experts_of(model)[0], []
    n = module.num_experts
    for name in ("_few", "_grouped", "_unpacked"):
        # hidden states, as a forward gives
        monkeypatch.setattr(kernels, name, lambda *args, name=name: ways.append(name) or args[3])

    def run(tokens: int) -> None:
        idx = torch.zeros(tokens, 2, dtype=torch.int64, device=DEVICE)
        hidden = torch.zeros(tokens, model.config.hidden_size, device=DEVICE).half()
        forward.packed_forward(module, hidden, idx, idx.half())

    run(2 * n)
    offload.offload(model, DEVICE, 0)
    run(2 * n)
    run(1)
    assert ways == ["_grouped", "_unpacked", "_grouped"]


@needs_triton
def test_a_model_moves_whole_but_for_its_experts(folder, kernels):
    model = tiny.load(folder())
    want = tiny.logits(model, tiny.tokens(1)[0].to(model.device)) if DEVICE.type == "cpu" else None
    names = sorted(model.state_dict())
    made = offload.offload(model, DEVICE, 0)
    assert sorted(model.state_dict()) == names and offload.offloaded(model) is made
    packed = {b.data_ptr() for m in experts_of(model) for b in m.packed.buffers()}
    for tensor in [*model.parameters(), *model.buffers()]:
        host = tensor.data_ptr() in packed
        assert tensor.device.type == ("cpu" if host else DEVICE.type)
        assert not tensor.requires_grad
        assert not host or DEVICE.type == "cpu" or tensor.is_pinned()
    if want is not None:
        assert torch.equal(tiny.logits(model, tiny.tokens(1)[0]), want)


@needs_triton
def test_generating_looks_now_and_then_and_says_what_was_served(folder, kernels, monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "FEW_PAIRS", 0)  # what is interpreted fast
    plain = generate(folder(), "the cat", tokens=6, exact=True)
    assert plain.cache is None
    looks = []
    refresh = offload.Offloaded.refresh
    monkeypatch.setattr(
        offload.Offloaded, "refresh", lambda self: (looks.append(self.pairs), refresh(self))[1]
    )
    monkeypatch.setattr(offload, "EVERY", 2)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(sys.modules["moecule.generate"], "_cache_bytes", lambda size, *_: size)
    made = generate(folder(), "the cat", tokens=6, exact=True, expert_cache=9000)
    assert made.text == plain.text and made.tokens == 6
    # after the prompt, whose uses are then forgotten, and every other token
    assert looks == [0, 0, 4, 12]
    assert 0 < made.cache.share < 1 and made.cache.device_bytes == 9000
    everything = generate(folder(), "the cat", tokens=6, exact=True, expert_cache=10**9)
    assert everything.text == plain.text and everything.cache.share == 1


@pytest.mark.slow
@needs_triton
def test_a_compiled_step_reads_what_tables_say_now(tmp_path):
    """One graph whatever comes and goes; as many uses are counted."""
    script = Path(__file__).with_name("traced.py")
    run = subprocess.run(
        [sys.executable, script, "mixtral", tmp_path, "offloaded"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["graphs"] == 1
    assert found["off_by"] < 1e-5
    assert found["moved"] > 0
    assert found["pairs"][0] == found["pairs"][1] > 0


@pytest.mark.parametrize(
    ("size", "said"),
    [("8 potatoes", "cannot read the size '8 potatoes'"), ("8GB", "not compressed.*compress it")],
)
def test_a_cache_that_cannot_be_is_refused_before_loading(size, said, checkpoint, monkeypatch):
    monkeypatch.setattr(Compute, "torch_device", lambda self: torch.device("cuda"))
    monkeypatch.setattr(sys.modules["moecule.generate"], "load", None)
    with pytest.raises(RecipeError, match=said):
        generate(checkpoint("mixtral", tokenizer=True), "x", expert_cache=size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cache_without_a_gpu_is_refused_before_loading(folder, monkeypatch):
    monkeypatch.setattr(sys.modules["moecule.generate"], "load", None)
    with pytest.raises(RecipeError, match="GPU's memory, and there is none"):
        generate(folder(), "x", expert_cache="8GB")


def test_what_the_cache_does_not_serve_is_refused(folder, monkeypatch):
    model = tiny.load(folder())
    if forward.GPU is None:
        with pytest.raises(RecipeError, match="needs a GPU and triton"):
            offload.offload(model, torch.device("cpu"), 0)
    monkeypatch.setattr(forward, "GPU", object())
    with pytest.raises(RecipeError, match="has experts of 16 bits.*8 bits at most"):
        offload.offload(tiny.load(folder(dense=True)), torch.device("cpu"), 0)
