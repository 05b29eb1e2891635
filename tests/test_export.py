"""Export to GGUF: what is written is what the folder holds, and llama.cpp computes the same of it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from moecule.errors import CheckpointError, OutputError, PlanError, RecipeError, VerifyError
from moecule.export import export
from moecule.packed import Packed, pack, unpack
from moecule.plan import Keep

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'moecule[export]'")
from gguf import GGUFReader  # noqa: E402
from gguf.quants import dequantize  # noqa: E402

from moecule.exports import auto_round, compressed, gguf_file, llama  # noqa: E402
from moecule.exports.arch import ARCHES  # noqa: E402
from moecule.exports.blocks import choose_type, decoded, encoded, holds, type_of  # noqa: E402
from moecule.exports.change import Tally  # noqa: E402
from moecule.exports.contents import Contents, Weight  # noqa: E402
from moecule.exports.stock import Widths  # noqa: E402

SIZES = {
    "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 32,
    "num_attention_heads": 4, "head_dim": 16, "vocab_size": tiny.VOCABULARY, "num_hidden_layers": 2,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
OWN = {
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
    "mixtral": {"sliding_window": None},
}
FAMILIES = sorted(ARCHES)
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed (it is built from source: pip install llama-cpp-python)",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stock model of each family, and what plans made of mixtral and qwen3_moe."""
    found: dict[str, Path] = {}
    for name in FAMILIES:
        found[name] = tmp_path_factory.mktemp(name)
        tiny.save(name, found[name], **SIZES, **OWN.get(name, {}))
        tiny.save_tokenizer(found[name])
    plans = {
        "layers": ("qwen3_moe", lambda i, e: Keep((4, 2)[i], 32)),
        "uniform": ("mixtral", lambda i, e: Keep(4, 32)),
        "mixed": ("mixtral", lambda i, e: Keep(2 + e % 2, 32)),
    }
    for name, (family, fate) in plans.items():
        streamed, out = tiny.stream(found[family]), tmp_path_factory.mktemp(name)
        made = tiny.plan(streamed, fate, rest={"attention": Keep(4, 64)})
        tiny.write(streamed, made, out, tiny.tokens())
        found[name] = out
    others = {
        "middle": ("qwen2_moe", (4,), "middle"),
        "middle8": ("mixtral", (8,), "middle"),
        "mixed248": ("qwen2_moe", (2, 4, 8), "whole"),
    }
    for name, (family, bits, zero) in others.items():
        streamed, out = tiny.stream(found[family]), tmp_path_factory.mktemp(name)
        rest = dict.fromkeys(("attention", "shared"), Keep(bits[-1], 32))
        made = tiny.plan(streamed, lambda i, e, b=bits: Keep(b[e % len(b)], 32), rest=rest)
        made = replace(made, encode={"method": "rtn", "zero": zero})
        tiny.write(streamed, made, out, tiny.tokens())
        found[name] = out
    return found


def written(folder: Path, out: Path, *types: str) -> dict[str, torch.Tensor]:
    """What the gguf package reads of what was written, by its names there."""
    gguf_file.write(Contents.open(folder), out, gguf_file.types_of(types), lambda: None)
    read = {}
    for t in GGUFReader(out).tensors:
        numbers = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        read[t.name] = numbers.reshape(*reversed(t.shape.tolist())).float()
    return read


def test_tensors_are_those_of_the_folder(folders, tmp_path):
    read = written(folders["layers"], tmp_path / "m.gguf")
    for i in range(2):
        part = Contents.open(folders["layers"]).part(i)
        for ours, theirs in {
            "gate_proj": "ffn_gate",
            "up_proj": "ffn_up",
            "down_proj": "ffn_down",
        }.items():
            stack = read[f"blk.{i}.{theirs}_exps.weight"]
            assert len(stack) == 8
            for e, got in enumerate(stack):
                want = part[f"model.layers.{i}.mlp.experts.{e}.{ours}.weight"].dense()
                torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * float(want.abs().max()))
        gate = part[f"model.layers.{i}.mlp.gate.weight"].dense()
        assert torch.equal(read[f"blk.{i}.ffn_gate_inp.weight"], gate)


def test_contents_are_what_the_folder_computes_with(folders):
    model = tiny.load(folders["mixed"])
    for i, layer in enumerate(model.model.layers):
        part, experts = Contents.open(folders["mixed"]).part(i), layer.mlp.experts
        for e, (kind, row) in enumerate(experts.slots):
            w1, w2, w3 = (
                part[f"model.layers.{i}.block_sparse_moe.experts.{e}.w{n}.weight"].dense()
                for n in (1, 2, 3)
            )
            assert torch.equal(torch.cat([w1, w3]), experts.packed[kind].weight("gate_up", row))
            assert torch.equal(w2, experts.packed[kind].weight("down", row))
        q = part[f"model.layers.{i}.self_attn.q_proj.weight"].dense()
        assert torch.equal(q, layer.self_attn.q_proj.weight)


def packed(bits: int, zero: float | None, group: int = 64) -> Packed:
    """Random codes of 192 columns."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (8, 192), generator=g)
    scale = (torch.rand(8, -(-192 // group), generator=g) * 0.01 + 0.001).half()
    zeros = None if zero is None else torch.full_like(scale, zero)
    return Packed(pack(codes, bits), scale, zeros, bits, group, 192)


@pytest.mark.parametrize(
    ("bits", "zero", "kind", "most"),
    [
        (1, None, "Q4_1", 0), (2, 1.3, "Q4_1", 1e-3), (2, 2, "Q4_0", 0), (3, 4, "Q4_0", 0),
        (4, 8, "Q4_0", 0), (4, 7.25, "Q4_1", 1e-3), (4, 9, "Q4_1", 1e-3), (5, 16, "Q5_0", 0),
        (5, 3.7, "Q5_1", 1e-3), (6, 32, "Q8_0", 0), (8, 128, "Q8_0", 0), (8, 100.5, "Q8_0", 0.02),
    ],
)  # fmt: skip
def test_codes_are_kept_where_a_type_holds_them(bits, zero, kind, most):
    weight = Weight(packed(bits, zero))
    found = choose_type([weight])
    assert found.name == kind
    got, want = decoded(encoded(weight, found), found), weight.dense()
    assert float((got - want).norm() / want.norm()) <= most
    assert holds(found, weight.value) == (most < 0.02)


def test_blocks_that_would_have_two_scales_are_encoded_anew():
    weight = Weight(packed(4, 8, group=48))
    assert choose_type([weight]).name == "Q8_0"
    assert not holds(type_of("Q4_1"), weight.value)
    got = decoded(encoded(weight, type_of("Q4_1")), type_of("Q4_1"))
    error = float((got - weight.dense()).norm() / weight.dense().norm())
    assert 1e-3 < error < 0.1  # never the codes under another scale


def test_one_type_for_experts_of_several_widths_only_if_asked(folders, tmp_path):
    with pytest.raises(
        PlanError, match="experts of 2, 3 bits, .*--recipe uniform or bsp.*--type Q4_1"
    ):
        written(folders["mixed"], tmp_path / "m.gguf")
    read = written(folders["mixed"], tmp_path / "m.gguf", "Q4_1")
    part = Contents.open(folders["mixed"]).part(1)
    for e in (0, 1):
        want = part[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"].dense()
        got = read["blk.1.ffn_down_exps.weight"][e]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * float(want.abs().max()))


def test_the_verb_says_what_became_of_the_weights(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "is_there", lambda: False)
    made = export(folders["uniform"], tmp_path / "out", "gguf", types=["16=Q8_0"])
    kinds = {(c.bits, c.kind): c for c in made.changes}
    assert set(kinds) == {(4, "Q4_1"), (16, "Q8_0"), (16, "F32")}
    assert 0 < kinds[4, "Q4_1"].error < 1e-3 < kinds[16, "Q8_0"].error < 0.02
    assert kinds[16, "F32"].error == 0
    assert "not run" in made.checked and made.kl_nats is None
    said = json.loads((tmp_path / "out" / "export.json").read_text())
    assert said["digest"] == made.digest and len(said["changes"]) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"out"}  # nothing is left beside it


def test_what_cannot_be_had_is_refused(folders, tmp_path, checkpoint):
    with pytest.raises(RecipeError, match="--to exl3' is not known|'exl3' is not known"):
        export(folders["uniform"], tmp_path / "a", "exl3")
    for item, said in (("Q9", "no such type"), ("x=Q4_0", "no width"), ("IQ1_S", "--type IQ1_S")):
        with pytest.raises(RecipeError, match=said):
            gguf_file.types_of([item])
    with pytest.raises(PlanError, match="written for mixtral, .*this is deepseek_v2"):
        export(checkpoint("deepseek_v2"), tmp_path / "a", "gguf")
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        export(checkpoint("qwen3_moe"), tmp_path / "a", "gguf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(OutputError, match="already holds mine"):
        export(folders["uniform"], tmp_path / "full", "gguf")
    assert {p.name for p in tmp_path.iterdir()} == {"full"}  # nothing half written


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(folders, tmp_path):
    from moecule.exports.vocabulary import _split, _tokens

    said = json.loads((folders["mixtral"] / "tokenizer.json").read_text())
    assert _split(said) == "gpt-2"
    with pytest.raises(CheckpointError, match="splits text"):
        _split(said | {"pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(CheckpointError, match="Unigram"):
        _tokens(said | {"model": {"type": "Unigram"}}, 300)


def test_a_file_that_reads_otherwise_fails(folders, tmp_path):
    file = tmp_path / "m.gguf"
    written(folders["uniform"], file)
    with pytest.raises(VerifyError, match="reads otherwise"):
        gguf_file._check(file, {"token_embd.weight": ("F32", 1)})


@needs_llama
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_same(folders, tmp_path, name):
    file = tmp_path / "m.gguf"
    gguf_file.write(Contents.open(folders[name]), file, {}, lambda: None)
    (ids,) = tiny.tokens(shape=(1, 20))
    want = tiny.logits(tiny.load(folders[name]), ids)[0]
    torch.testing.assert_close(llama.run_file(file, ids[0].tolist()), want, rtol=1e-4, atol=1e-4)


@needs_llama
def test_what_llama_cpp_computes_of_codes_is_compared(folders, tmp_path):
    made = export(folders["layers"], tmp_path / "out", "gguf")
    assert made.kl_nats is not None and made.kl_nats < 0.02
    assert "run by llama.cpp" in made.checked


@needs_llama
def test_llama_cpp_encodes_what_gguf_does_not():
    weight = Weight(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)))
    errors = {}
    for name in ("Q2_K", "Q4_K", "Q6_K"):
        kind = type_of(name)
        got = decoded(encoded(weight, kind), kind)
        errors[name] = float((got - weight.dense()).norm() / weight.dense().norm())
    assert 0.4 > errors["Q2_K"] > errors["Q4_K"] > errors["Q6_K"] > 0.01
    with pytest.raises(RecipeError, match="importance matrix"):
        type_of("IQ2_XXS")


needs_compressed = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install 'moecule[export]'",
)


@needs_compressed
@pytest.mark.parametrize("name", ["middle", "middle8"])
def test_transformers_computes_the_same_of_compressed_tensors(folders, tmp_path, name):
    made = export(folders[name], tmp_path / "out", "compressed-tensors")
    assert made.error == 0 and made.kl_nats < 1e-5  # it multiplies codes and scales in fp16
    assert "run by transformers" in made.checked
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] in ("qwen2_moe", "mixtral") and "moecule" not in said
    left = [n for n in said["quantization_config"]["ignore"] if n.endswith("gate")]
    assert len(left) == (4 if name == "middle" else 2)  # routers, and gates of shared experts


@needs_compressed
def test_the_words_are_those_of_compressed_tensors(folders, tmp_path):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for bits in (4, 8):
        value = packed(bits, 2 ** (bits - 1))
        made = compressed._coded("", value, Tally())
        codes, scale = compressed.centred(value)
        assert torch.equal(made["weight_packed"], pack_to_int32(codes.to(torch.int8), bits))
        assert torch.equal(made["weight_scale"], value.scale) and torch.equal(scale, value.scale)
        assert made["weight_shape"].tolist() == [8, 192]


def test_zero_points_elsewhere_are_rounded_anew_and_the_error_is_said(folders, tmp_path):
    tally = Tally()
    compressed._coded("", packed(4, 6.5), tally)
    (change,) = tally.changes()
    assert 0.01 < change.error < 0.2 and change.kind == "int4 g64"
    codes, _ = compressed.centred(packed(3, 3))  # 3 fits 4 codes below 0 and 3 above: not these
    assert codes.min() >= -4 and codes.max() <= 3


def test_what_would_load_as_something_else_is_refused(folders, tmp_path):
    for name, said in (
        ("mixed", "experts have several widths .*loaded as if they had one.*--to auto-round"),
        ("layers", "experts have several widths"),
        ("mixtral", "stock checkpoint of 16 bits"),
    ):
        with pytest.raises(PlanError, match=said):
            export(folders[name], tmp_path / "out", "compressed-tensors")
    with pytest.raises(RecipeError, match="--type is of gguf"):
        export(folders["middle"], tmp_path / "out", "compressed-tensors", types=["Q4_0"])
    only = Widths({0: (Keep(3, 64),)}, {})
    with pytest.raises(PlanError, match="experts have 3 bits in groups of 64, .* take 4 or 8 bits"):
        compressed._one_width(only)
    with pytest.raises(PlanError, match="192 columns, no whole groups of 128"):
        compressed._check_columns("x", packed(4, 8, group=128))
    assert not list(tmp_path.iterdir())


def test_auto_rounds_words_are_turned(folders):
    value = packed(4, 5)
    made = auto_round._coded("x.", replace(value, codes=value.codes), Tally())
    codes = torch.stack([made["x.qweight"] >> 4 * j & 15 for j in range(8)], 1).flatten(0, 1)
    assert torch.equal(codes.mT, unpack(value.codes, 4, 192))
    assert made["x.scales"].shape == (3, 8) and torch.equal(made["x.scales"], value.scale.mT)


def test_zero_points_between_codes_are_rounded_anew_for_auto_round():
    tally = Tally()
    _, _, zero = auto_round._whole(packed(4, 5))
    assert zero.dtype == torch.int32 and bool((zero == 5).all())
    auto_round._coded(
        "x.", replace(packed(4, 6.5), codes=pack(torch.arange(192).expand(8, -1) % 16, 4)), tally
    )
    (change,) = tally.changes()
    assert 1e-3 < change.error < 0.1


def test_auto_round_takes_experts_of_2_4_and_8_bits(folders, tmp_path):
    made = export(folders["mixed248"], tmp_path / "out", "auto-round")
    assert {c.bits for c in made.changes} == {2, 4, 8, 16} and made.error == 0
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    found = {n: of["bits"] for n, of in said["extra_config"].items()} | {"": said["bits"]}
    stem = "model.layers.1.mlp.experts"
    assert [found.get(f"{stem}.{e}.up_proj", said["bits"]) for e in range(3)] == [2, 4, 8]
    assert found["model.layers.1.mlp.gate"] == 16
    if importlib.util.find_spec("auto_round") is not None:  # it multiplies codes and scales in fp16
        assert made.kl_nats < 0.05
    else:
        assert made.checked == "auto_round is not installed, so not opened" and made.kl_nats is None


def test_what_auto_round_would_fill_in_at_random_is_refused(folders, tmp_path):
    for name, said in (
        ("mixed", "weights of 3 bits, and auto-round unpacks 2, 4 and 8"),
        ("middle8", "mixtral names its experts on disk otherwise .*at random"),
    ):
        with pytest.raises(PlanError, match=said):
            export(folders[name], tmp_path / "out", "auto-round")
    with pytest.raises(
        PlanError, match=r"\[8, 192\] in groups of 64, and auto-round wants rows in 32s"
    ):
        auto_round._check_shape("x", packed(4, 8))
    assert not list(tmp_path.iterdir())


def test_codes_may_be_unpacked_into_a_stock_checkpoint(folders, tmp_path):
    made = export(folders["mixed"], tmp_path / "out", "transformers")
    assert {(c.bits, c.kind) for c in made.changes} >= {(2, "float32"), (3, "float32")}
    assert made.error == 0 and made.kl_nats < 1e-9
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == "mixtral" and "quantization_config" not in said
