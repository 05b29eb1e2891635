"""SlimMoE's scores, against masks; and cutting, against zeros."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from every import config as tiny_config
from test_laws_written import assert_same_bytes, whole
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig

from moecule.calibrate import collect
from moecule.checkpoint import Checkpoint
from moecule.errors import RecipeError
from moecule.heads import PROJECTIONS, attention_in, heads_of
from moecule.hf import auto_class
from moecule.methods import slimmoe
from moecule.moe import experts_in, find_layers, first_matrix
from moecule.train.cut import cut, slim_keys, width_of
from moecule.train.losses import distil
from moecule.train.sensitivity import Felt, feel, likeliest_kl, signal_loss

# with biases, interleaved and transposed; a sparse mixer; norms of queries and keys; sigmoid and groups
NAMES = ("gpt_oss", "phimoe", "qwen3_moe", "glm4_moe", "mixtral")
SERVED = ("phimoe", "qwen3_moe", "mixtral", "granitemoe", "gemma4")  # heads too
HEADS = (
    "aria",
    "cohere2_moe",
    "dots1",
    "ernie4_5_moe",
    "glm4v_moe",
    "jamba",
    "nemotron_h",
    "solar_open",
)


def meta(config):
    """The model of a config, without weights."""
    with torch.device("meta"):
        return auto_class(type(config)).from_config(config)


def folded(by_channel: Tensor, module) -> Tensor:
    """Of each channel -> of each row of the first matrix."""
    if not module.has_gate:
        return by_channel
    if module.is_concatenated:
        return torch.cat([by_channel, by_channel], -1)
    return by_channel.repeat_interleave(2, -1)


def masked(module, name: str, mask: Tensor, full: bool) -> dict[str, Tensor]:
    """An experts module's weights, channels times a mask [E, F]."""
    lies = module.is_transposed
    out = {f"{name}.down_proj": module.down_proj * (mask[:, :, None] if lies else mask[:, None, :])}
    if full:
        first, rows = first_matrix(module), folded(mask, module)
        up = getattr(module, first)
        out[f"{name}.{first}"] = up * (rows[:, None, :] if lies else rows[:, :, None])
        if module.has_bias:
            out[f"{name}.{first}_bias"] = getattr(module, f"{first}_bias") * rows
    return out


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_gradients_of_masks_on_channels(name, full, checkpoint):
    model = tiny.load(checkpoint(name), torch.float64, experts="eager")
    batches = tiny.tokens(2)
    got = feel(model, model, batches, "lm", full=full).channels
    assert not any(p.grad is not None for p in model.parameters())
    prefix, layers = find_layers(model)
    for i, layer in enumerate(layers):
        for inner, module in experts_in(layer):
            shape, want = (module.num_experts, got[i].shape[1]), torch.zeros_like(got[i])
            for batch in batches:
                mask = torch.ones(shape, dtype=torch.float64, requires_grad=True)
                held = masked(module, f"{prefix}.{i}.{inner}", mask, full)

                def run(ids, held=held, **how):
                    return functional_call(model, held, (ids,), how)

                (by_mask,) = torch.autograd.grad(signal_loss(run, model, batch, "lm"), mask)
                want += by_mask.abs()
            torch.testing.assert_close(got[i], want, rtol=1e-9, atol=1e-15)
            assert want.max() > 0


@pytest.mark.parametrize("name", ["phimoe", "qwen3_moe"])
def test_scores_are_gradients_of_masks_on_groups_of_heads(name, checkpoint):
    model = tiny.load(checkpoint(name), torch.float64, experts="eager")
    (batch,) = tiny.tokens(1)
    got, heads = feel(model, model, [batch], "topk_ce", groups=True).groups, heads_of(model)
    prefix, layers = find_layers(model)
    assert sorted(got) == list(range(len(layers)))
    for i, layer in enumerate(layers):
        inner, attention = attention_in(layer)
        mask = torch.ones(heads.groups, dtype=torch.float64, requires_grad=True)
        held = {}
        for leaf in PROJECTIONS:
            for n, p in attention.get_submodule(leaf).named_parameters():
                size = p.shape[1] if leaf == "o_proj" and n == "weight" else p.shape[0]
                each = mask.repeat_interleave(size // heads.groups)
                if leaf != "o_proj":
                    held[f"{prefix}.{i}.{inner}.{leaf}.{n}"] = (p.mT * each).mT
                elif n == "weight":
                    held[f"{prefix}.{i}.{inner}.{leaf}.{n}"] = p * each

        def run(ids, held=held, **how):
            return functional_call(model, held, (ids,), how)

        (want,) = torch.autograd.grad(signal_loss(run, model, batch, "topk_ce"), mask)
        torch.testing.assert_close(got[i], want.abs(), rtol=1e-9, atol=1e-15)


def test_a_recipe_scores_as_slim_does_by_the_next_token(checkpoint):
    folder, batches = checkpoint("mixtral"), tiny.tokens(2)
    stats = dict(collect(tiny.stream(folder), batches, slimmoe.METHOD.needs(slimmoe.Options())))
    model = tiny.load(folder)
    want = feel(model, model, batches, "lm").channels
    for i, found in slimmoe.channels(stats, slimmoe.Options()).items():
        scale = batches[0][:, 1:].numel()  # walking takes the sum of a batch's losses
        torch.testing.assert_close(found, want[i] * scale, rtol=1e-3, atol=1e-6)


def test_its_own_teacher_has_a_gradient_by_the_likeliest_alone(checkpoint):
    model = tiny.load(checkpoint("qwen3_moe"), torch.float64, experts="eager")
    (batch,) = tiny.tokens(1)
    logits = model(batch).logits.detach()
    moved = logits.clone().requires_grad_()
    (by_kl,) = torch.autograd.grad(distil(moved, logits), moved)
    assert by_kl.abs().max() < 1e-6
    (by_likeliest,) = torch.autograd.grad(likeliest_kl(moved, logits, 8), moved)
    p = logits[:, :-1].softmax(-1)
    top, at = p.topk(8)
    want = p * top.sum(-1, keepdim=True)
    want = want.scatter_add(-1, at, -top) / p[..., 0].numel()
    torch.testing.assert_close(by_likeliest[:, :-1], want, rtol=1e-4, atol=1e-7)
    assert want.abs().max() > 1e-3
    for signal in ("topk_ce", "lm", "noise"):
        found = feel(model, model, [batch], signal)
        assert all(s.max() > 0 for s in found.channels.values())
        again = feel(model, model, [batch], signal)
        assert all(torch.equal(s, again.channels[i]) for i, s in found.channels.items())


def test_the_likeliest_of_equal_scores_are_the_first():
    scores = torch.tensor([[1.0, 3, 2, 3], [0, 0, 0, 0]]).double()
    felt = Felt({0: scores}, {0: scores[0]})
    assert felt.channels_kept(2)[0].tolist() == [[1, 3], [0, 1]]
    assert felt.groups_kept(3)[0].tolist() == [1, 2, 3]
    assert felt.starved == 1


def test_all_three_slices_count_the_up_rows_as_the_down_columns(checkpoint):
    """Said in slimmoe.py: both scale what enters the down projection."""
    model = tiny.load(checkpoint("mixtral"), torch.float64, experts="eager")
    model.requires_grad_(True)
    signal_loss(model, model, tiny.tokens(1)[0], "lm").backward()
    (_, module), *_ = experts_in(model)
    down = slimmoe.felt(module.down_proj, module.down_proj.grad)
    first, width = module.gate_up_proj, down.shape[1]
    up = slimmoe.felt(first.mT, first.grad.mT)[:, width:]
    torch.testing.assert_close(up, down, rtol=1e-9, atol=1e-15)


def kept(folder: Path, groups: int | None) -> Felt:
    """Some scores, the same every time."""
    model, lot = tiny.load(folder), torch.Generator().manual_seed(0)
    _, layers = find_layers(model)
    of = {
        i: torch.rand(m.num_experts, width_of(model), generator=lot).double()
        for i, layer in enumerate(layers)
        for _, m in experts_in(layer)
    }
    n = heads_of(model).groups if groups else 0
    by_head = {i: torch.rand(n, generator=lot).double() for i in range(len(layers)) if n}
    return Felt(of, by_head)


@torch.no_grad()
def zeroed(folder: Path, channels, groups) -> Tensor:
    """Logits where what goes is multiplied by 0."""
    model = tiny.load(folder)
    _, layers = find_layers(model)
    for i, layer in enumerate(layers):
        for _, module in experts_in(layer):
            mask = torch.zeros(module.num_experts, width_of(model)).scatter_(1, channels[i], 1.0)
            module.down_proj.mul_(mask[:, :, None] if module.is_transposed else mask[:, None, :])
        if i in groups and attention_in(layer):
            heads, weight = heads_of(model), attention_in(layer)[1].o_proj.weight
            mask = torch.zeros(heads.groups).index_fill_(0, groups[i], 1.0)
            weight.mul_(mask.repeat_interleave(weight.shape[1] // heads.groups))
    return tiny.logits(model, tiny.tokens(1)[0])


@pytest.mark.parametrize(
    ("name", "width", "groups"),
    [
        *((n, 8, 1) for n in SERVED),
        *((n, 8, None) for n in ("gpt_oss", "qwen2_moe")),
        *(pytest.param(n, 16, 1, marks=pytest.mark.slow) for n in HEADS),
    ],
)
def test_what_is_cut_computes_as_if_it_were_0(name, width, groups, checkpoint, tmp_path):
    folder = checkpoint(name)
    felt = kept(folder, groups)
    channels = felt.channels_kept(width)
    of_heads = felt.groups_kept(groups) if groups else {}
    cut(tiny.stream(folder), channels, of_heads, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").config["model_type"] == name
    model = tiny.load(tmp_path / "out")
    assert width_of(model) == width
    assert groups is None or heads_of(model).groups == groups
    got = tiny.logits(model, tiny.tokens(1)[0])
    torch.testing.assert_close(got, zeroed(folder, channels, of_heads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_at_full_width_the_files_are_the_same(name, checkpoint, tmp_path):
    folder = checkpoint(name, dtype=torch.bfloat16)
    felt = kept(folder, 2 if name in SERVED else None)
    full = width_of(tiny.load(folder))
    of_heads = felt.groups_kept(2) if felt.groups else {}
    cut(tiny.stream(folder), felt.channels_kept(full), of_heads, tmp_path / "out")
    assert_same_bytes(whole(folder), whole(tmp_path / "out"))
    before, after = (
        tiny.logits(tiny.load(f), tiny.tokens(1)[0]) for f in (folder, tmp_path / "out")
    )
    assert torch.equal(before, after)


# Phi-3.5-MoE as its config.json has it
PHI = {
    "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2,
    "attention_bias": True, "lm_head_bias": True, "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}  # fmt: skip


def test_phi_mini_and_phi_tiny_are_reached_from_phi_moe():
    config = AutoConfig.for_model("phimoe", **PHI)
    model = meta(config)
    assert sum(p.numel() for p in model.parameters()) == 41_873_153_344
    tiny_heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    for width, groups, heads, billions in ((960, None, {}, 7.645), (448, 4, tiny_heads, 3.752)):
        keys = slim_keys(model, width, groups)
        assert keys == {"intermediate_size": width, **heads}
        slim = copy.deepcopy(config)
        slim.update(keys)
        n = sum(p.numel() for p in meta(slim).parameters())
        assert n / 1e9 == pytest.approx(
            billions, rel=1e-3
        )  # of the cards: without routers and norms


@pytest.mark.parametrize(
    ("name", "width", "groups", "said"),
    [
        ("mixtral", 24, None, "width = 24, and this model's experts have 16 channels; wanted a multiple"),
        ("mixtral", 12, None, "wanted a multiple of 8 from 8 to 16"),
        ("mixtral", 0, None, "width = 0"),
        ("deepseek_v3", 8, None, "no key of deepseek_v3's config says how wide its experts are"),
        ("mixtral", 8, 3, "groups = 3, and the model has 2 groups of heads; give 1 to 2"),
        ("mixtral", 8, 0, "groups = 0"),
        ("gpt_oss", 8, 1, "self_attn of gpt_oss has sinks of 4 numbers"),
        ("olmoe", 8, 1, "has q_norm.weight of 32 numbers, which are not of one head of 8"),
        ("qwen3_next", 8, 1, "wanted 4 query and 2 key heads of 8"),  # gated queries
        ("deepseek_v3", 16, 1, "deepseek_v3 has no attention with q_proj, k_proj, v_proj, o_proj"),
    ],
)  # fmt: skip
def test_what_a_config_cannot_say_is_refused(name, width, groups, said):
    with pytest.raises(RecipeError) as e:
        slim_keys(meta(tiny_config(name)), width, groups)
    assert said in str(e.value)
