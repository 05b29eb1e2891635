"""Conversations with pictures: what the model is given, and that it is compressed and measured on it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import every
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_cli import refused, run
from torch import Tensor
from transformers import AriaProcessor, AutoTokenizer
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from moecule import chat
from moecule.batch import IGNORED, digest, labels_of, n_predicted, n_tokens, text_tokens, tokens_of
from moecule.calibrate import collect
from moecule.data import Sampling
from moecule.errors import CheckpointError, DataError
from moecule.moe import listening
from moecule.session import Compute, reader_of, stream
from moecule.stats import TOKENS, load_stats
from moecule.text import calibration_batches, evaluation_batches
from moecule.walk import walk_back

PICTURE, PIECES = (
    257,
    4,
)  # the token that stands for a piece of a picture, and how many pieces it has
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|img|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
FEW = ("--samples", "3", "--length", "64", "--set", "group=16")


def turn(role: str, *parts: str) -> dict[str, Any]:
    """A message: names of pictures, and text."""
    kinds = ["image" if p.endswith(".png") else "text" for p in parts]
    return {"role": role, "content": [{"type": k, k: p} for k, p in zip(kinds, parts, strict=True)]}


CHATS = [
    [turn("user", f"{i}.png", f"What is number {i}?"), turn("it", f"It is {i} and noise.")]
    for i in range(6)
] + [[turn("user", "No picture, only words."), {"role": "it", "content": "Words it is."}]]


def write_chats(file: Path, chats: list[Any]) -> Path:
    file.write_text("\n".join(json.dumps({"messages": c}) for c in chats) + "\n")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """seeing/: a tiny model that sees, with its processor; chats.jsonl and its pictures; plain/: blind."""
    if not every.is_new_enough("aria"):
        pytest.skip("this transformers is too old for the model that sees")
    folder = tmp_path_factory.mktemp("seeing")
    settings = copy.deepcopy(every.MODELS["aria"])
    settings["text_config"]["vocab_size"] = tiny.VOCABULARY
    settings["vision_config"] |= {"patch_size": 140, "image_size": 980}
    settings |= {"projector_patch_to_query_dict": {49: PIECES}, "image_token_index": PICTURE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(every.MODELS, "aria", settings)
        tiny.save("aria", folder / "seeing")
    tiny.save_tokenizer(folder / "seeing")
    tokenizer = AutoTokenizer.from_pretrained(
        folder / "seeing", extra_special_tokens={"image_token": "<|img|>"}
    )
    assert tokenizer.image_token_id == PICTURE
    AriaProcessor(
        AriaImageProcessorPil(), tokenizer, chat_template=TEMPLATE, size_conversion={980: PIECES}
    ).save_pretrained(folder / "seeing")
    tiny.save("qwen3_moe", folder / "plain", vocab_size=tiny.VOCABULARY)
    tiny.save_tokenizer(folder / "plain")
    (folder / "plain" / "chat_template.jinja").write_text(PLAIN)
    noise = np.random.default_rng(0)
    for i in range(6):
        pixels = noise.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    write_chats(folder / "chats.jsonl", CHATS)
    return folder


def drawn(place: Path, name: str = "chats.jsonl", **how: Any) -> list[Any]:
    streamed = stream(place / "seeing", Compute())
    return calibration_batches(streamed, place / name, Sampling(**{"length": 64, **how}))


def deep_batch(seed: int) -> dict[str, Tensor]:
    """For qwen3_vl_moe: text around a picture of 4 by 4 patches, which become 4 tokens."""
    g = torch.Generator().manual_seed(seed)
    config = every.config("qwen3_vl_moe")
    ids = torch.randint(1, 50, (1, 14), generator=g)
    kinds = torch.zeros_like(ids)
    kinds[:, 5:9] = 1
    config_ids = {"image": 60, "start": 61, "end": 62}
    ids[:, 4], ids[:, 9] = config_ids["start"], config_ids["end"]
    ids[kinds == 1] = config_ids["image"]
    vision = config.vision_config
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": torch.randn(16, patch, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "labels": ids.masked_fill(kinds == 1, IGNORED),
    }


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A tiny qwen3_vl_moe, whose pictures are added between layers too."""
    folder = tmp_path_factory.mktemp("deep")
    settings = copy.deepcopy(every.MODELS["qwen3_vl_moe"])
    settings |= {"image_token_id": 60, "vision_start_token_id": 61, "vision_end_token_id": 62}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(every.MODELS, "qwen3_vl_moe", settings)
        tiny.save("qwen3_vl_moe", folder)
    return folder


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model's own forward takes."""
    return {k: v for k, v in batch.items() if k != "labels"}


def test_walking_with_a_picture_equals_calling(deep):
    batches = [deep_batch(seed) for seed in (0, 1)]
    streamed = tiny.stream(deep)
    there = tiny.walked(streamed, batches)
    assert any(call.added is not None for call in there.calls[0][1:])  # between layers, too
    model = tiny.load(deep, experts="grouped_mm")
    for batch, h in zip(batches, there.last, strict=True):
        with torch.no_grad():
            want = model(**inputs(batch), use_cache=False).logits
            blind = batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])}
            other = model(**inputs(blind), use_cache=False).logits
            assert torch.equal(streamed.logits(h, batch), want)
        assert not torch.allclose(want, other, atol=1e-3)  # the picture matters


def test_the_gradient_is_of_the_loss_of_words_alone(deep):
    batch = deep_batch(0)
    streamed = tiny.stream(deep, torch.float64)
    there = tiny.walked(streamed, [batch], keep=True)
    got = {}
    for back in walk_back(streamed, there, [batch]):
        with listening(streamed.moe(back.index)) as heard:
            got[back.index] = torch.cat([grad for _, _, grad in back.passes(heard.live)])
    model = tiny.load(deep, torch.float64, experts="eager")
    streamed.model = model
    outs: dict[int, Tensor] = {}
    for i in got:
        streamed.moe(i).experts.register_forward_hook(
            lambda m, args, out, i=i: outs.__setitem__(i, out)
        )
    model.get_input_embeddings().weight.requires_grad_()
    loss = model(**inputs(batch), labels=batch["labels"], use_cache=False).loss
    total = loss * n_predicted([batch])  # transformers gives the mean
    want = torch.autograd.grad(total, [outs[i] for i in got])
    for i, grad in zip(got, want, strict=True):
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(got[i], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_pieces_of_a_picture_count_as_tokens_of_the_experts(deep):
    batches = [deep_batch(seed) for seed in (0, 1)]
    for _, sums in collect(tiny.stream(deep), batches, (TOKENS,)):
        assert int(sums[TOKENS.name].sum()) == n_tokens(batches) == 28


def test_a_conversation_is_what_the_processor_makes_of_it(place):
    batches = drawn(place, samples=7)
    assert len(batches) == 7
    for batch in batches:
        ids, labels = tokens_of(batch), labels_of(batch)
        pieces = ids == PICTURE
        assert int(pieces.sum()) == (PIECES if "pixel_values" in batch else 0)
        assert torch.equal(labels == IGNORED, pieces)
        assert torch.equal(text_tokens(batch)[0], ids[~pieces])
    assert sum("pixel_values" in b for b in batches) == 6


def test_drawing_is_seeded_and_what_is_held_out_is_other(place):
    config = stream(place / "seeing", Compute()).model.config
    sampling = Sampling(samples=3, length=64)
    first, again = drawn(place, samples=3), drawn(place, samples=3)
    assert digest(first) == digest(again) != digest(drawn(place, samples=3, seed=1))
    file = place / "chats.jsonl"
    held = evaluation_batches(config, place / "seeing", (), 0, file, sampling)
    (rest,) = held.values()
    whole = evaluation_batches(config, place / "seeing", [file], 0, None, sampling)["chats.jsonl"]
    assert len(rest) == 4 and len(whole) == 7
    seen = {digest([b]) for b in first}
    assert not seen & {digest([b]) for b in rest}
    assert seen | {digest([b]) for b in rest} == {digest([b]) for b in whole}


def test_long_conversations_are_left_out_whole(place):
    with pytest.warns(UserWarning, match="gives 1 conversations of at most 48 tokens, 7 were"):
        short = drawn(place, samples=7, length=48)
    assert ["pixel_values" in b for b in short] == [False]
    with pytest.raises(DataError, match="none of 7 conversations has 2 to 20 tokens"):
        drawn(place, samples=7, length=20)


def test_a_model_is_compressed_and_measured_on_what_it_sees(place, tmp_path):
    out = tmp_path / "out"
    args = (place / "seeing", "-o", out, "--bits", "2.5", "--data", place / "chats.jsonl", *FEW)
    code, said, err = run("compress", *args, "--device", "cpu", "--json")
    assert code == 0, err
    result = json.loads(said)
    sampling = Sampling(samples=3, length=64)
    config = stream(place / "seeing", Compute()).model.config
    (held,) = evaluation_batches(
        config, place / "seeing", (), 0, place / "chats.jsonl", sampling
    ).values()
    for folder, found in ((place / "seeing", "original_loss_nats"), (out, "loss_nats")):
        model, total = tiny.load(folder), 0.0
        for batch in held:
            with torch.no_grad():
                total += float(model(**batch).loss) * n_predicted([batch])
        assert result[found] == pytest.approx(total / n_predicted(held), rel=1e-5)
    sums, _ = load_stats(out / "stats")
    tokens = {int(of[TOKENS.name].sum()) for of in sums.values() if TOKENS.name in of}
    assert tokens <= {n_tokens(drawn(place, samples=3))}
    assert isinstance(reader_of(out), AriaProcessor)  # it goes along


def test_a_model_without_a_processor_is_calibrated_on_chats_of_words(place, tmp_path):
    file = write_chats(tmp_path / "words.jsonl", [CHATS[-1]] * 3)
    args = (place / "plain", "-o", tmp_path / "stats", "--data", file, "--recipe", "uniform_rtn")
    assert run("calibrate", *args, "--samples", "3", "--length", "64")[0] == 0
    meta = json.loads((tmp_path / "stats" / "meta.json").read_text())
    words = "user: No picture, only words.\nit: Words it is.\n"
    assert meta["window"] == [3, len(words)]


BROKEN = {
    "no JSON": ('{"messages": [}', "line 2: not JSON"),
    "no messages": ('{"text": "x"}', "line 2: found .* wanted {\"messages\": "),
    "an empty list": ('{"messages": []}', "line 2: found .* wanted {\"messages\": "),
    "no role": ('{"messages": [{"content": "x"}]}', "wanted {\"role\": "),
    "content of another kind": ('{"messages": [{"role": "u", "content": 3}]}', "wanted {\"role\": "),
    "a part of another kind": (
        '{"messages": [{"role": "u", "content": [{"type": "audio", "audio": "a.wav"}]}]}',
        "found .*audio.* wanted {\"type\": \"text\"",
    ),
    "a part that is no file": (
        '{"messages": [{"role": "u", "content": [{"type": "image", "image": 5}]}]}', "a file",
    ),
    "half a surrogate": (
        '{"messages": [{"role": "u", "content": "\\ud800"}]}', "line 2 is no Unicode text",
    ),
    "a picture that is not there": (
        '{"messages": [{"role": "u", "content": [{"type": "image", "image": "none.png"}]}]}',
        "none.png cannot be read as a picture",
    ),
    "a picture that is none": (
        '{"messages": [{"role": "u", "content": [{"type": "image", "image": "chats.jsonl"}]}]}',
        "chats.jsonl cannot be read as a picture",
    ),
    "an address": (
        '{"messages": [{"role": "u", "content": [{"type": "image", "image": "https://a.b/c"}]}]}',
        "cannot be read as a picture",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_conversation_that_cannot_be_taken_is_refused(place, what):
    line, said = BROKEN[what]
    file = place / "broken.jsonl"
    file.write_text(json.dumps({"messages": CHATS[-1]}) + "\n" + line + "\n")
    args = (place / "seeing", "-o", place / "out", "--data", file, *FEW)
    assert re.search(said, refused(place, "calibrate", *args))


def test_pictures_need_who_sees_them(place, monkeypatch):
    args = (place / "plain", "-o", place / "out", "--data", place / "chats.jsonl", *FEW)
    assert "is a picture, and there is no processor" in refused(place, "calibrate", *args)
    monkeypatch.setitem(sys.modules, "PIL", None)  # as if it were not installed
    with pytest.raises(DataError, match="needs Pillow; pip install pillow"):
        chat.open_picture(place / "0.png")


def test_a_processor_that_does_not_load_is_named(place, tmp_path):
    shutil.copytree(place / "seeing", tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no processor that loads"):
        reader_of(tmp_path / "model")


def test_a_template_that_refuses_is_named(place, tmp_path):
    shutil.copytree(place / "plain", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    file = write_chats(tmp_path / "words.jsonl", [CHATS[-1]])
    for text in ("{{ raise_exception('user only') }}", None):
        template.write_text(text) if text else template.unlink()
        args = (tmp_path / "model", "-o", tmp_path / "out", "--data", file, *FEW)
        assert "chat template does not take" in refused(tmp_path, "calibrate", *args)
