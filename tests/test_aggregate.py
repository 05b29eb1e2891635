"""Several models become one: copies compute what one does, and nothing that differs is let pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import every
import pytest
import tiny
import torch
from test_cli import refused, run
from torch import Tensor

from moecule.aggregate import aggregate
from moecule.checkpoint import Checkpoint
from moecule.errors import CheckpointError, OutputError, RecipeError
from moecule.family import family_names
from moecule.moe import experts_in, find_layers, find_moe
from moecule.writer import Writer


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of a few tokens, experts one by one."""
    return tiny.logits(tiny.load(folder, dtype, experts="eager"), tiny.tokens(1)[0])


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint, by their names on disk."""
    opened = Checkpoint.open(folder)
    return opened.read(list(opened.tensors))


def trained(folder: Path, name: str, seed: int, **changes: Any) -> Path:
    """Another model of the family."""
    model = tiny.save(name, folder, **changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two Mixtrals."""
    return [trained(tmp_path / f"model_{seed}", "mixtral", seed) for seed in (1, 2)]


# between them groups, named as in memory or not, biases for the choice beside a sigmoid or a softmax,
# biases of logits, scores that are not renormalised, and experts that lie otherwise on disk
FAST = (
    "deepseek_v3",
    "ernie4_5_moe",
    "gpt_oss",
    "kimi_linear",
    "mixtral",
    "qwen2_moe",
    "qwen3_vl_moe",
)
# their coefficients would add up to more, or their router picks two whatever it is told
OWN_PICKS = ("dots1", "inkling_mm_model", "kolibri1", "phimoe")
OTHERS = sorted({*family_names()} & {*every.known()} - {*FAST, *OWN_PICKS})


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_copies_of_a_model_compute_what_it_does(name, checkpoint, tmp_path):
    source = checkpoint(name)
    made = aggregate([source, source], tmp_path / "out")
    assert (made.experts, made.top_k) == (16, 4)
    assert {m.num_experts for _, m in experts_in(tiny.load(made.folder))} == {16}
    want = logits(source)
    torch.testing.assert_close(
        logits(made.folder), want, rtol=0, atol=4e-6 * float(want.abs().max())
    )


@pytest.mark.parametrize(
    ("name", "n"), [("mixtral", 2), ("mixtral", 3), ("qwen3_moe", 2), ("gpt_oss", 2)]
)
def test_but_for_the_order_of_sums_these_are_the_same_bits(
    name, n, checkpoint, tmp_path, monkeypatch
):
    softmax = torch.nn.functional.softmax  # routers ask for float32, whatever they are given
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x.double(), dim=dim)
    )
    source, x = checkpoint(name), tiny.normal(1, 50, 32).double()
    made = aggregate([source] * n, tmp_path / "out").folder
    for i in range(3):
        got, want = (block_of(folder, i)(x) for folder in (made, source))
        assert not torch.equal(want.float(), x.float())
        assert torch.equal(got.float(), want.float())


def block_of(folder: Path, i: int) -> Any:
    """What the MoE block of a layer computes, in float64."""
    layer = find_layers(tiny.load(folder, torch.float64, experts="eager"))[1][i]

    @torch.no_grad()
    def block(x: Tensor) -> Tensor:
        out = find_moe(layer, tiny.stream(folder).family).block(x)
        return out[0] if isinstance(out, tuple) else out

    return block


def test_copies_of_a_model_that_picks_one_expert_compute_the_same_bits(tmp_path):
    tiny.save("mixtral", tmp_path / "one", num_experts_per_tok=1)
    made = aggregate([tmp_path / "one"] * 2, tmp_path / "out")
    assert made.top_k == 2
    assert torch.equal(logits(made.folder), logits(tmp_path / "one"))


def test_experts_and_rows_follow_each_other_and_the_rest_is_the_mean(two, tmp_path):
    a, b = map(tensors, two)
    mean, first = (
        tensors(aggregate(two, tmp_path / how, dense=how).folder) for how in ("average", "first")
    )
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    q = "model.layers.0.self_attn.q_proj.weight"
    for made in (mean, first):
        assert torch.equal(made[gate], torch.cat([a[gate], b[gate]]))
        for e in range(8):
            at = "model.layers.2.block_sparse_moe.experts.{}.w2.weight"
            assert torch.equal(made[at.format(e)], a[at.format(e)])
            assert torch.equal(made[at.format(8 + e)], b[at.format(e)])
    assert torch.equal(first[q], a[q])
    torch.testing.assert_close(mean[q], (a[q] + b[q]) / 2)


def test_sources_may_have_other_numbers_of_experts(two, tmp_path):
    small = trained(tmp_path / "small", "mixtral", 3, num_local_experts=4)
    made = aggregate([two[0], small], tmp_path / "out", top_k=2)
    assert made.experts == 12 and logits(made.folder).isfinite().all()


def test_centering_changes_no_source_and_evens_them(two, tmp_path):
    made = tensors(aggregate(two, tmp_path / "out", center=True).folder)
    for name in (n for n in made if n.endswith("gate.weight")):
        for rows in made[name].chunk(2):
            torch.testing.assert_close(rows.mean(0), torch.zeros(32), rtol=0, atol=1e-7)
    copies = aggregate([two[0]] * 2, tmp_path / "copies", center=True)
    want = logits(two[0])
    torch.testing.assert_close(
        logits(copies.folder), want, rtol=0, atol=4e-6 * float(want.abs().max())
    )


def changed(folder: Path, out: Path, **config: Any) -> Path:
    """A copy whose config.json says something else, or no longer says it."""
    shutil.copytree(folder, out)
    said = json.loads((out / "config.json").read_text()) | config
    text = json.dumps({k: v for k, v in said.items() if v is not None})
    (out / "config.json").write_text(text)
    return out


def test_models_that_are_not_alike_are_refused(two, checkpoint, tmp_path):
    others = {
        "model_type is 'mixtral' and 'qwen3_moe'": checkpoint("qwen3_moe"),
        "vocab_size is 64 and 80": trained(tmp_path / "v", "mixtral", 1, vocab_size=80),
        "hidden_size is 32 and 64": trained(tmp_path / "h", "mixtral", 1, hidden_size=64),
        "rms_norm_eps": changed(two[0], tmp_path / "e", rms_norm_eps=0.5),
    }
    for said, other in others.items():
        with pytest.raises(CheckpointError, match=f"not alike: {said}.*; give models"):
            aggregate([two[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_what_cannot_be_is_refused(two, checkpoint, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="1 model was given"):
        aggregate(two[:1], out)
    with pytest.raises(RecipeError, match="top_k = 17.*give 1 to 16"):
        aggregate(two, out, top_k=17)
    with pytest.raises(RecipeError, match="sigmoid.*leave out --center"):
        aggregate([checkpoint("deepseek_v3")] * 2, out, center=True)
    with pytest.raises(CheckpointError, match="no key that counts experts"):
        few = [changed(m, tmp_path / f"few{i}", num_local_experts=None) for i, m in enumerate(two)]
        aggregate(few, out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    made = aggregate(two, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert aggregate(two, out) == made
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(OutputError, match="already holds"):
        aggregate(two, out, dense="first")
    shutil.rmtree(out)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="already holds"):
        aggregate(two, out)


def test_picks_that_would_add_up_to_more_are_refused(tmp_path):
    tiny.save("deepseek_v3", tmp_path / "a", norm_topk_prob=False)
    with pytest.raises(RecipeError, match="sigmoid: 4 picks would add up to more.*give --top-k 2"):
        aggregate([tmp_path / "a"] * 2, tmp_path / "out")
    assert aggregate([tmp_path / "a"] * 2, tmp_path / "out", top_k=2).top_k == 2


def test_a_router_that_picks_as_it_likes_is_found_out(checkpoint, tmp_path):
    with pytest.raises(RecipeError, match="phimoe pick 2 whatever.*give --top-k 2"):
        aggregate([checkpoint("phimoe")] * 2, tmp_path / "out")
    made = aggregate([checkpoint("phimoe")] * 2, tmp_path / "out", top_k=2)
    assert logits(made.folder).isfinite().all()


def test_tokenizers_of_other_vocabularies_are_refused(checkpoint, tmp_path):
    source, other = checkpoint("mixtral", tokenizer=True), tmp_path / "other"
    shutil.copytree(source, other)
    told = json.loads((other / "tokenizer.json").read_text())
    words = list(told["model"]["vocab"])
    told["model"]["vocab"][words[5]], told["model"]["vocab"][words[6]] = 6, 5
    (other / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="tokenizers of other vocabularies"):
        aggregate([source, other], tmp_path / "out")
    made = aggregate([source, source], tmp_path / "out")
    assert (made.folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_killed_in_the_middle_it_leaves_nothing_that_loads(two, tmp_path, monkeypatch):
    class Killed(BaseException):  # nothing catches it
        pass

    def kill(writer: Writer, part: str, of: Any, add: Any = Writer.add) -> None:
        if part == "layer-0001":
            raise Killed
        add(writer, part, of)

    monkeypatch.setattr(Writer, "add", kill)
    with pytest.raises(Killed):
        aggregate(two, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_command_says_what_it_made(two, tmp_path):
    code, out, err = run("aggregate", *two, "-o", tmp_path / "out", "--top-k", "2", "--json")
    assert code == 0, err
    told = {"checkpoint": str(tmp_path / "out"), "experts": 16, "top_k": 2}
    assert json.loads(out) == told
    assert "give A B" in refused(tmp_path, "aggregate", two[0], "-o", tmp_path / "other")
