"""Every family that transformers serves: what of the laws holds is what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import conform
import every
import pytest
import test_drop as drop
import test_laws as laws
import test_laws_written as written
import tiny
import torch
from safetensors.torch import load_file, save_file

import moecule
from moecule import turn
from moecule.calibrate import collect
from moecule.catalogue import FOUND, catalogue, readme_table, served_by_transformers
from moecule.errors import CheckpointError
from moecule.families import REFUSED
from moecule.family import Family, family_names, load_family
from moecule.hf import check_version
from moecule.journal import HIDDEN, Trail, journal_of
from moecule.plan import Keep
from moecule.recipe import load_recipe
from moecule.session import Compute, stream_any
from moecule.stats import TURN_COEF_NORM
from moecule.walk import walk

SERVED = [n for n in family_names() if n in every.known() and every.is_new_enough(n)]
OTHERS = [name for name in SERVED if name not in tiny.FAMILIES]  # not gone through elsewhere
each = pytest.mark.parametrize("name", OTHERS)


@each
def test_walking_equals_calling(name, checkpoint):
    laws.test_walking_equals_calling(name, torch.float32, checkpoint)


@pytest.mark.slow
@each
def test_listening_changes_nothing(name, checkpoint):
    laws.test_listening_changes_nothing_and_hears_what_the_experts_say(name, checkpoint)


@pytest.mark.slow
@each
def test_all_laws_of_what_is_heard(name, checkpoint):
    if name not in ("gemma4", "phimoe"):  # gemma4 scales by expert, phimoe masks before each choice
        laws.test_a_tokens_coefficients_are_its_probabilities_up_to_a_factor(name, checkpoint)
    laws.test_every_statistic_is_a_finite_float64_sum_by_expert_or_layer(name, checkpoint)


@pytest.mark.slow
@each
def test_gradients(name, checkpoint):
    laws.test_walking_back_gives_the_gradients_of_the_whole_model(name, checkpoint)


@pytest.mark.slow
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bytes(name, dtype, checkpoint):
    written.test_reading_and_writing_back_gives_the_same_bytes(name, dtype, checkpoint)


@pytest.mark.slow
@each
def test_keep_everything(name, checkpoint, tmp_path):
    written.test_a_plan_that_keeps_everything_gives_the_same_tensors(name, checkpoint, tmp_path)


@pytest.mark.slow
@each
@pytest.mark.parametrize("fate", [written.uniform, written.ragged])
def test_dropping(name, fate, checkpoint, tmp_path):
    written.test_dropping_experts_equals_masking_them_in_the_router(
        name, fate, checkpoint, tmp_path
    )


@pytest.mark.slow
@each
def test_picking_fewer(name, tmp_path):
    if name != "phimoe":  # it picks two, by a rule for two
        drop.test_a_router_that_picks_fewer_does_so_in_the_file_too(name, Keep(), tmp_path)


@pytest.mark.slow
@each
def test_the_norm_before_the_experts_is_found(name, checkpoint, monkeypatch):
    if name == "muse_spark":
        pytest.skip("its experts live in another width; test_drop.py has what it says")
    found, of = [], turn.Before.of

    def noting(self, x, out):
        read = x if self.given is None else self.given
        found.append(any(normed.data_ptr() == read.data_ptr() for _, normed in self.norms))
        return of(self, x, out)

    monkeypatch.setattr(turn.Before, "of", noting)
    for _ in collect(tiny.stream(checkpoint(name)), tiny.tokens(), [TURN_COEF_NORM]):
        pass
    # the one norms what its blocks give; the other's blocks are given a mix of several streams
    assert set(found) == {name not in ("flex_olmo", "qwen4_exp")}


@pytest.mark.slow
@each
def test_packed(name, checkpoint, tmp_path):
    written.test_a_packed_checkpoint_loads_as_what_was_walked(name, checkpoint, tmp_path)


@pytest.mark.slow
@each
def test_walking_what_is_packed_equals_calling_it(name, checkpoint, tmp_path):
    out, batches = tmp_path / "out", tiny.tokens(2)
    streamed = tiny.stream(checkpoint(name))
    tiny.write(streamed, tiny.plan(streamed, written.mixed, rest=written.REST), out, batches)
    packed, model = stream_any(out, Compute("cpu", "float32")), tiny.load(out)
    for batch, hidden in zip(batches, tiny.walked(packed, batches).last, strict=True):
        with torch.no_grad():
            assert torch.equal(packed.logits(hidden, batch), tiny.logits(model, batch))


@pytest.mark.slow
@each
def test_rounded(name, checkpoint, tmp_path):
    written.test_loaded_weights_are_the_rounded_ones_bit_for_bit(
        name, torch.float32, checkpoint, tmp_path
    )


@pytest.mark.slow
@each
@pytest.mark.parametrize("fate", [written.mixed, written.uniform, written.ragged])
def test_bytes(name, fate, checkpoint, tmp_path):
    written.test_a_plans_bytes_are_the_files_bytes(name, fate, checkpoint, tmp_path)


@pytest.mark.slow
@each
def test_untouched(name, checkpoint):
    written.test_leaving_everything_costs_what_the_original_weighs(name, checkpoint)


def test_every_law_was_run_over_every_family_that_is_said_to_be_served():
    laws_run = json.loads(FOUND.read_text())["laws"]
    assert sorted(laws_run) == family_names()
    assert min(laws_run.values()) >= 16


def test_the_table_in_the_readme_is_that_of_the_catalogue():
    assert conform.TABLE.search(conform.README.read_text())[0] == readme_table()


def test_the_catalogue_names_each_family_once():
    listed = {family.name: family for family in catalogue()}
    assert len(listed) == len(catalogue())
    assert {f.name for f in listed.values() if f.status == "refused"} == set(REFUSED)
    assert set(served_by_transformers()) <= set(listed)
    assert not set(REFUSED) & set(family_names())


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "inkling_text", "gemma4_text"])
def test_the_text_part_by_itself_is_of_the_same_family(name):
    assert load_family(name).model_type.startswith(name.removesuffix("_text"))


def test_too_old_a_transformers_is_named():
    with pytest.raises(CheckpointError, match="zoo needs transformers 99.1 or newer.*update it"):
        check_version(Family("zoo", since="99.1"))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_family_says_why(name):
    with pytest.raises(CheckpointError, match=f"'{name}' is not served: "):
        load_family(name)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("model.layers.61.mlp.gate.weight", "transformers passes over"),
        ("model.layers.1.mlp.surprise", "has no place for"),
    ],
)
def test_what_the_model_has_no_place_for_is_left_out_and_said(extra, said, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("deepseek_v3"), folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {extra: torch.ones(2)}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match=f"holds 1 tensors.*{extra}.*{said}.*left out"):
        streamed = tiny.stream(folder)
    tiny.write(streamed, tiny.plan(streamed, lambda i, e: Keep()), tmp_path / "out", tiny.tokens())
    assert sorted(written.whole(tmp_path / "out")) == sorted(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "nemotron_h", "glm_moe_dsa", "lfm2_moe"])
def test_compressing_and_generating(name, checkpoint, tmp_path):
    recipe = load_recipe("mc", {"data.samples": 4, "data.length": 64})
    cpu = Compute("cpu", "float32")
    made = moecule.compress(
        checkpoint(name, tokenizer=True), tmp_path / "out", recipe=recipe,
        ask=moecule.Ask(bits=3.0), compute=cpu, text=[Path(__file__)],
    )  # fmt: skip
    assert made.after.nominal_bits <= 3.0
    said = moecule.generate(tmp_path / "out", "Once", tokens=3, skip=True, compute=cpu)
    assert said.tokens == 3 and 0.5 < said.experts_run < 1


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_killed_walk_goes_on_with_what_layers_hand_on(place, checkpoint, tmp_path):
    out, batches, folder = tmp_path / "out", tiny.tokens(2), checkpoint("glm_moe_dsa")
    want = tiny.walked(tiny.stream(folder), batches).last
    with journal_of(out, {}) as journal:  # killed in layer 1, which takes what layer 0 handed on
        up = walk(
            tiny.stream(folder), batches, trail=Trail(place, journal.folder / HIDDEN, journal)
        )
        assert [next(up).index, next(up).index] == [0, 1]
        up.close()
    with journal_of(out, {}) as journal:
        trail = Trail(place, journal.folder / HIDDEN, journal)
        assert trail.done("up") == 1
        found = tiny.walked(tiny.stream(folder), batches, trail=trail).last
        assert all(map(torch.equal, found, want))
