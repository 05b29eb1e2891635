"""Quantised sources open as what they would be in bf16; each is made here by an encoder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import moecule
from moecule import session
from moecule.budget import bytes_by_part
from moecule.checkpoint import Checkpoint
from moecule.decode import FP8, decode_fp8, decode_mxfp4
from moecule.errors import CheckpointError
from moecule.inventory import take_inventory, weigh
from moecule.plan import Drop, Fate, Keep

Tensors = dict[str, Tensor]
Encoded = tuple[Tensors, Tensors]  # (what lies on disk for it, what it stands for: by name)
Encoder = Callable[[str, Tensor], Encoded]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
PROJECTION = "model.layers.1.self_attn.q_proj.weight"


def fp8(rows: int, columns: int, suffix: str, dtype: torch.dtype = torch.float32) -> Encoder:
    """Blocks of rows x columns, one after the other; 0 is all of them. Of matrices in layers only."""

    def encode(name: str, w: Tensor) -> Encoded:
        if w.dim() != 2 or ".layers." not in name or name.endswith(("gate.weight", "norm.weight")):
            return {name: w}, {name: w}
        m, n = w.shape
        a, b = rows or m, columns or n
        codes, wanted = torch.zeros(m, n), torch.zeros(m, n)
        scales = torch.zeros(-(-m // a), -(-n // b), dtype=dtype)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(i * a, i * a + a), slice(j * b, j * b + b))
                scales[i, j] = w[at].float().abs().max() / 448
                codes[at] = (w[at].float() / scales[i, j].float()).to(torch.float8_e4m3fn).float()
                wanted[at] = codes[at] * scales[i, j].float()
        whole = scales.reshape(()) if rows == columns == 0 else scales
        on_disk = {name: codes.to(torch.float8_e4m3fn), f"{name}{suffix}": whole}
        return on_disk, {name: wanted.bfloat16()}

    return encode


def mxfp4(name: str, w: Tensor) -> Encoded:
    """Experts' matrices, their transpose cut in runs of 32; nearest code by comparing with all."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: w}, {name: w}
    runs = w.mT.float().unflatten(-1, (-1, 32))
    power = torch.floor(torch.log2(runs.abs().amax(-1, keepdim=True))) - 2
    codes = (runs[..., None] / 2 ** power[..., None] - torch.tensor(E2M1)).abs().argmin(-1)
    wanted = (torch.tensor(E2M1)[codes] * 2**power).flatten(-2).mT
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    scales = (power.squeeze(-1) + 127).to(torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, {
        name: wanted.bfloat16().contiguous()
    }


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    """quantization_config of compressed-tensors."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    how = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    return {**how, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
# {case: (family, quantization_config, encoder, bits a weight of the experts with their scales)}
CASES: dict[str, tuple[str, dict[str, Any], Encoder, float]] = {
    "fp8": ("deepseek_v3", BLOCKS, fp8(16, 16, "_scale_inv"), 8 + 32 / 256),
    "fp8 ragged": (
        "qwen3_moe", BLOCKS | {"weight_block_size": [12, 20]},
        fp8(12, 20, "_scale_inv", torch.bfloat16), 8 + 16 * (2 * 4 + 3) / (3 * 512),
    ),
    "fp8 of a tensor": (
        "qwen3_moe", {"quant_method": "fp8", "weight_block_size": None}, fp8(0, 0, "_scale_inv"),
        8 + 32 / 512,
    ),
    "fp8 of another name": (
        "mixtral", {"quant_method": "fp8"}, fp8(0, 0, "_scale"), 8 + 32 / 512,
    ),
    "tensor": ("mixtral", compressed("tensor"), fp8(0, 0, "_scale"), 8 + 32 / 512),
    "channel": (
        "qwen3_moe", compressed("channel"), fp8(1, 0, "_scale", torch.bfloat16),
        8 + 16 * (2 * 16 + 32) / (3 * 512),
    ),
    "block": (
        "deepseek_v3", compressed("block", block_structure=[16, 16]), fp8(16, 16, "_scale"),
        8 + 32 / 256,
    ),
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4"}, mxfp4, 4.25),
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {"gpt_oss": {"intermediate_size": 32}}
every_case = pytest.mark.parametrize("case", CASES)


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Other tensors in the only shard."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantise(folder: Path, how: Mapping[str, Any], encode: Encoder) -> Tensors:
    """Quantise a checkpoint in place; what it now stands for."""
    on_disk: Tensors = {}
    wanted: Tensors = {}
    for name, w in load_file(folder / "model.safetensors").items():
        codes, stands_for = encode(name, w)
        on_disk |= codes
        wanted |= stands_for
    assert any(n not in wanted for n in on_disk)
    save_file(on_disk, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
    return wanted


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Tensors]]:
    """made(case): (the quantised folder, a bf16 folder of what it stands for, those tensors)."""
    done: dict[str, tuple[Path, Path, Tensors]] = {}

    def make(case: str) -> tuple[Path, Path, Tensors]:
        if case not in done:
            name, how, encode, _ = CASES[case]
            root = tmp_path_factory.mktemp("quantised")
            changes = {"vocab_size": tiny.VOCABULARY} | CHANGES.get(name, {})
            tiny.save(name, root / "plain", torch.bfloat16, **changes)
            tiny.save_tokenizer(root / "plain")
            shutil.copytree(root / "plain", root / "coded")
            wanted = quantise(root / "coded", how, encode)
            save_file(wanted, root / "plain" / "model.safetensors", metadata={"format": "pt"})
            done[case] = (root / "coded", root / "plain", wanted)
        return done[case]

    return make


@pytest.fixture
def coded(made: Any, tmp_path: Path) -> Path:
    """A block fp8 deepseek_v3 to damage."""
    return Path(shutil.copytree(made("fp8")[0], tmp_path / "model"))


@every_case
def test_the_view_is_the_bf16_checkpoint(case, made):
    folder, plain, wanted = made(case)
    found, want = Checkpoint.open(folder), Checkpoint.open(plain)
    assert found.config == want.config
    assert found.is_coded and not want.is_coded
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in want.tensors.items()
    }
    read = found.read(list(found.tensors))
    assert [n for n in wanted if not torch.equal(read[n], wanted[n])] == []
    assert found.size_bytes == sum(
        t.nbytes for t in load_file(folder / "model.safetensors").values()
    )


@every_case
def test_what_is_not_asked_for_is_not_decoded(case, made):
    folder, _, wanted = made(case)
    checkpoint = Checkpoint.open(folder)
    name = next(n for n, t in checkpoint.tensors.items() if t.coded)
    read = checkpoint.read([name])
    assert list(read) == [name]
    assert torch.equal(read[name], wanted[name])


@every_case
@torch.no_grad()
def test_walking_equals_calling_the_bf16_model(case, made):
    folder, plain, _ = made(case)
    batches = tiny.tokens(2)
    streamed = tiny.stream(folder)
    assert not hasattr(streamed.model.config, "quantization_config")
    experts = streamed.model.config.get_text_config()._experts_implementation
    model = tiny.load(plain, experts=experts)
    hidden = tiny.walked(streamed, batches).last
    loaded = session.load(folder, session.Compute(device="cpu", dtype="float32"))
    for batch, h in zip(batches, hidden, strict=True):
        want = tiny.logits(model, batch)
        torch.testing.assert_close(streamed.logits(h, batch), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tiny.logits(loaded, batch), want, rtol=1e-5, atol=1e-5)


def some(layer: int, e: int) -> Fate:
    """Every kind of fate, two experts of each group of four dropped in the last layer."""
    return Drop() if layer == 2 and e % 4 > 1 else Keep((16, 4, 2)[(layer + e) % 3], 16)


@every_case
@pytest.mark.parametrize("fate", [some, lambda layer, e: Keep()], ids=["packed", "stock"])
def test_what_is_written_is_that_of_the_bf16_model(case, fate, made, tmp_path):
    folder, plain, _ = made(case)
    for name, source in (("of coded", folder), ("of plain", plain)):
        streamed = tiny.stream(source)
        plan = tiny.plan(streamed, fate)
        price = sum(bytes_by_part(take_inventory(streamed), plan).values())
        tiny.write(streamed, plan, tmp_path / name, tiny.tokens(2))
        assert price == Checkpoint.open(tmp_path / name).size_bytes
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("of coded", "of plain"))
    assert sorted(a) == sorted(b)
    assert [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])] == []
    quantised = json.loads((tmp_path / "of coded" / "config.json").read_text()).get(
        "quantization_config", {"quant_method": None}
    )
    assert quantised["quant_method"] == ("moecule" if fate is some else None)
    batch = tiny.tokens(1)[0]
    got, want = (tiny.logits(tiny.load(tmp_path / n), batch) for n in ("of coded", "of plain"))
    assert torch.equal(got, want)


@every_case
def test_sizes_are_those_on_disk(case, made):
    folder, _, wanted = made(case)
    sizes, bits = weigh(Checkpoint.open(folder)), CASES[case][3]
    on_disk = {n: t.nbytes for n, t in load_file(folder / "model.safetensors").items()}
    experts = {n: size for n, size in on_disk.items() if ".experts." in n}
    matrices = [t for n, t in wanted.items() if ".experts." in n and not n.endswith("bias")]
    biases = sum(size for n, size in experts.items() if n.endswith("bias"))
    weights = sum(t.numel() for t in matrices)
    assert sizes["size_bytes"] == sum(on_disk.values()) == sum(sizes["bytes_by_part"].values())
    assert sizes["expert_bytes"] == sum(experts.values())
    assert sizes["nominal_bits"] == (4 if case == "mxfp4" else 8)
    assert 8 * (sizes["expert_bytes"] - biases) / weights == pytest.approx(bits)
    assert sizes["bits_per_weight"] == 8 * sizes["expert_bytes"] / weights


@pytest.mark.slow
def test_a_quantised_original_is_compressed_and_compared_with(made, tmp_path):
    folder, _, _ = made("fp8")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran after it. " * 400)
    found = moecule.compress(folder, tmp_path / "out", recipe="uniform", data=text, text=[text])
    assert (found.before.nominal_bits, found.after.nominal_bits) == (8.0, 3.0)
    assert found.before.bits_per_weight == CASES["fp8"][3]
    assert found.after.kl_nats > 0


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_is_decoded_as_transformers_does(scale):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.where(codes.float().isnan(), torch.zeros(256), codes.float())
    codes = codes[torch.randperm(256)].to(torch.float8_e4m3fn).reshape(2, 8, 16)
    scales = torch.rand(2, 2, 4).mul(0.1).to(scale)
    want = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert torch.equal(decode_fp8(codes, scales.float(), 4, 4), want)


def test_mxfp4_is_decoded_as_transformers_does():
    scales = torch.arange(0, 252, dtype=torch.uint8).reshape(2, 126, 1)  # up to where 6 overflows
    blocks = torch.arange(256, dtype=torch.uint8).repeat(16).reshape(1, 256, 1, 16)[:, :252]
    blocks = blocks.reshape(2, 126, 1, 16)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    got = decode_mxfp4(blocks, scales.view(torch.float8_e8m0fnu).to(torch.bfloat16))
    assert torch.equal(got.view(torch.int16), want.contiguous().view(torch.int16))


def test_stacked_experts_have_a_scale_a_block_or_a_half(made, tmp_path):
    folder = shutil.copytree(made("fp8 of a tensor")[1], tmp_path / "model")
    prefix = "model.layers.{}.mlp.experts."
    whole: Tensors = {}

    def stack(t: Tensors) -> None:
        for i in range(3):
            p = prefix.format(i)
            of = [[t.pop(f"{p}{e}.{m}_proj.weight") for e in range(8)] for m in ("gate", "up")]
            stacks = {
                "gate_up_proj": torch.cat([torch.stack(o) for o in of], dim=1),
                "down_proj": torch.stack([t.pop(f"{p}{e}.down_proj.weight") for e in range(8)]),
            }
            for name, w in stacks.items():
                scale = torch.rand(8, 2 if name == "gate_up_proj" else 1, 1) / 100
                t[p + name] = (w.float() / 0.01).to(torch.float8_e4m3fn)
                t[f"{p}{name}_scale_inv"] = scale
                t[f"{p}{name}_activation_scale"] = torch.ones(8)
                rows = scale.repeat_interleave(w.shape[1] // scale.shape[1], 1)
                whole[p + name] = (t[p + name].float() * rows).bfloat16()

    edit(folder, stack)
    file = folder / "config.json"
    how = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    file.write_text(json.dumps(json.loads(file.read_text()) | how))
    checkpoint = Checkpoint.open(folder)
    read = checkpoint.read(list(whole))
    assert [n for n in whole if not torch.equal(read[n], whole[n])] == []
    assert not any("scale" in n for n in checkpoint.tensors)
    layer = tiny.stream(folder).load_layer(1)
    got = layer.mlp.experts.gate_up_proj
    assert torch.equal(got, whole[prefix.format(1) + "gate_up_proj"].float())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq'; decoded are fp8, mxfp4"),
    "awq": ({"quant_method": "awq"}, "quantised by 'awq'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes'"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantised by 'modelopt'"),
    "no method": ({"bits": 4}, "quantised by None"),
    "fp4 experts": (BLOCKS | {"expert_dtype": "fp4"}, "quantised by 'fp8' .experts of fp4"),
    "mxfp4 elsewhere": ({"quant_method": "mxfp4"}, "by 'mxfp4' .deepseek_v3.*gpt_oss"),
    "int4": (compressed("group") | {"format": "pack-quantized"}, "compressed-tensors' .pack-quan"),
    "int8": (compressed("channel", type="int"), "compressed-tensors' .int, 8 bits"),
    "groups": (compressed("group", group_size=32), "compressed-tensors' .a scale a group"),
    "odd zero": (
        compressed("channel", symmetric=False),
        "' .float, with zero points",
    ),
    "sparse": (compressed("tensor") | {"sparsity_config": {"format": "s24"}}, "' .sparse"),
    "rotated": (compressed("tensor") | {"transform_config": {"a": 1}}, "' .transformed"),
    "no groups": (compressed("tensor") | {"config_groups": None}, "config_groups is no table"),
    "no size": (compressed("block"), "block_structure is 'missing', wanted two numbers above 0"),
    "size of nothing": (
        BLOCKS | {"weight_block_size": [0, 16]},
        "weight_block_size is \\[0, 16\\]",
    ),
    "size of words": (BLOCKS | {"weight_block_size": "all"}, "weight_block_size is 'all', wanted"),
    "size of floats": (
        BLOCKS | {"weight_block_size": [1.5, 2]},
        "weight_block_size is \\[1.5, 2\\]",
    ),
    "other size": (
        BLOCKS | {"weight_block_size": [8, 8]},
        "does not fit .* with a scale a block of 8 x 8; fetch it again",
    ),
    "size missing": (
        {"quant_method": "fp8"},
        "with one scale .config.json has no block size.; fet",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_decoded_is_refused(name, coded):
    how, said = REFUSED[name]
    file = coded / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
    with pytest.raises(CheckpointError, match=said) as e:
        Checkpoint.open(coded)
    assert "\n" not in str(e.value)


def test_fp8_without_a_config_is_refused(coded):
    file = coded / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": None}))
    with pytest.raises(CheckpointError, match="is F8_E4M3, .* config.json does not say how; fetch"):
        Checkpoint.open(coded)


@pytest.mark.parametrize("how", [BLOCKS, {"quant_method": "mxfp4"}])
def test_a_config_that_speaks_of_what_is_not_there_is_refused(how, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("gpt_oss"), tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
    with pytest.raises(CheckpointError, match="config.json says .*, and no tensor is quantised; "):
        Checkpoint.open(folder)


SCALE = f"{PROJECTION}_scale_inv".replace("q_proj", "q_b_proj")
WEIGHT = SCALE.removesuffix("_scale_inv")
DAMAGED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no scale": (lambda t: t.pop(SCALE), f"{WEIGHT} is F8_E4M3, .*: no {SCALE}; fetch it again"),
    "no weight": (lambda t: t.pop(WEIGHT), f"{SCALE} has no {WEIGHT}; fetch it again"),
    "scale of another shape": (
        lambda t: t.update({SCALE: torch.ones(3, 1)}),
        f"{SCALE} is F32 \\[3, 1\\], which does not fit {WEIGHT}, F8_E4M3 \\[64, 16\\], with a scale a",
    ),
    "one scale": (
        lambda t: t.update({SCALE: torch.ones(())}),
        f"{SCALE} is F32 \\[\\], which does",
    ),
    "scale of integers": (
        lambda t: t.update({SCALE: t[SCALE].to(torch.int32)}),
        f"{SCALE} is I32 .*, wanted F32, BF16, F16, F8_E8M0; fetch",
    ),
    "bytes as scale": (lambda t: t.update({SCALE: t[SCALE].byte()}), f"{SCALE} is U8"),
    "weight of bf16": (
        lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}),
        f"{WEIGHT} is BF16 \\[64, 16\\] and has a scale, which F8_E4M3",
    ),
    "NaN": (lambda t: t[SCALE].fill_(torch.nan), f"{SCALE} holds NaN or Inf"),
    "Inf": (lambda t: t[SCALE][0].fill_(torch.inf), f"{SCALE} holds NaN or Inf"),
    "NaN of codes": (
        lambda t: t[WEIGHT].view(torch.uint8)[3].fill_(127),
        f"{WEIGHT} holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_fp8_that_is_damaged_is_refused(name, coded):
    damage, said = DAMAGED[name]
    edit(coded, damage)
    with pytest.raises(CheckpointError, match=said) as e:
        tiny.stream(coded).load_layer(1)
    assert "\n" not in str(e.value)


UP = "model.layers.1.mlp.experts.gate_up_proj"
DAMAGED_MXFP4: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{UP}_scales"), f"{UP}_blocks has no {UP}_scales; fetch"),
    "no blocks": (lambda t: t.pop(f"{UP}_blocks"), f"{UP}_scales has no blocks; fetch"),
    "odd columns": (
        lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"][..., :15].contiguous()}),
        f"{UP}_blocks is U8 .*15\\], wanted U8 .experts, rows, columns / 32, 16",
    ),
    "three axes": (
        lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"].flatten(-2)}),
        f"{UP}_blocks is U8 .*, wanted U8 .experts, rows, columns",
    ),
    "scales of another shape": (
        lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"][:, 1:].contiguous()}),
        f"{UP}_scales is U8 \\[8, 63, 1\\], wanted U8 \\[8, 64, 1\\]; fetch",
    ),
    "scales of floats": (
        lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].float()}),
        f"{UP}_scales is F32 .*, wanted U8",
    ),
    "NaN": (lambda t: t[f"{UP}_scales"][2].fill_(255), f"{UP}_scales holds NaN or Inf"),
    "overflow": (lambda t: t[f"{UP}_scales"][2].fill_(254), f"{UP} holds NaN or Inf"),
}


@pytest.mark.parametrize("name", DAMAGED_MXFP4)
def test_mxfp4_that_is_damaged_is_refused(name, made, tmp_path):
    folder = shutil.copytree(made("mxfp4")[0], tmp_path / "model")
    damage, said = DAMAGED_MXFP4[name]
    edit(folder, damage)
    with pytest.raises(CheckpointError, match=said) as e:
        tiny.stream(folder).load_layer(1)
    assert "\n" not in str(e.value)


def plainly(codes: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Code times scale for every number, by torch's own conversion."""
    m, n = codes.shape[-2:]
    by_row = scale.repeat_interleave(rows, -2)[..., :m, :]
    return (codes.float() * by_row.repeat_interleave(columns, -1)[..., :n]).bfloat16()


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 80])
@pytest.mark.parametrize("cached", [1, 40 * 7, 2**18])
def test_every_fp8_code_is_decoded_in_pieces_of_any_size(dtype, rows, cached, monkeypatch):
    monkeypatch.setattr("moecule.decode.CACHED", cached)
    every = torch.arange(256, dtype=torch.uint8).repeat(2 * 80 * 40 // 256).view(dtype)
    for codes in (
        every.view(2, 80, 40),
        every.view(2, 80, 40).float().nan_to_num(0, 0, 0).to(dtype),
    ):
        for columns in (7, 40):
            scale = torch.rand(2, -(-80 // rows), -(-40 // columns))
            want, made = (
                plainly(codes, scale, rows, columns),
                decode_fp8(codes, scale, rows, columns),
            )
            assert torch.equal(made.isnan(), want.isnan())
            number = ~want.isnan()  # bit for bit: a zero has a sign
            assert torch.equal(made[number].view(torch.int16), want[number].view(torch.int16))


@every_case
def test_parts_are_decoded_later_to_the_same(case, made):
    folder, _, wanted = made(case)
    checkpoint = Checkpoint.open(folder)
    parts = checkpoint.read_parts(list(checkpoint.tensors))
    assert {n: t.nbytes for n, t in parts.items()} == {
        n: t.decoded_bytes for n, t in checkpoint.stored.items()
    }
    read = checkpoint.decoded(list(checkpoint.tensors), parts, torch.device("cpu"))
    assert [n for n in wanted if not torch.equal(read[n], wanted[n])] == []
