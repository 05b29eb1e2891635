"""A stock checkpoint that export writes, its card, and what a killed export leaves."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from test_crash import DIED, child, content
from test_report import result

from moecule.errors import OutputError, PlanError
from moecule.licence import head_of, licence_of
from moecule.plan import Drop, Keep

exporting = import_module("moecule.export")
export = exporting.export
HEAD = (
    "---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE\nlanguage: en\n---\n# A model\n"
)


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory) -> Path:
    """model/, whose card names a licence, and what was made of it: pruned/, packed/, with results."""
    here = tmp_path_factory.mktemp("made")
    shutil.copytree(checkpoint("mixtral", tokenizer=True), here / "model")
    (here / "model" / "README.md").write_text(HEAD)
    for name, stays in (("pruned", Keep()), ("packed", Keep(4, 32))):
        streamed = tiny.stream(here / "model")
        plan = tiny.plan(
            streamed,
            lambda i, e, s=stays: Drop() if e == 2 else s,
        )
        tiny.write(streamed, plan, here / name, tiny.tokens())
        (here / name / "result.json").write_text(result(plan, 2).dumps())
    return here


def test_what_was_only_pruned_is_copied_and_gets_a_card(made, tmp_path):
    told = export(made / "pruned", tmp_path / "out", "transformers")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in (made / "pruned").iterdir()} - {
        "plan.yaml", "result.json",
    } | {"export.json"}  # fmt: skip
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (made / "pruned" / weights).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 7 and "moecule" not in config
    assert told.error == 0 and told.kl_nats is not None and told.kl_nats < 1e-9
    tensors = load_file(made / "pruned" / weights)
    assert sum(c.matrices for c in told.changes) == len(tensors)
    assert sum(c.size_bytes for c in told.changes) == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("name", ["pruned", "packed"])
def test_a_card_says_what_of_how_and_at_what_cost(made, tmp_path, name):
    export(made / name, tmp_path / "out", "transformers")
    card = (tmp_path / "out" / "README.md").read_text()
    assert licence_of(tmp_path / "out") == {
        "license": "other", "license_name": "ours", "license_link": "LICENSE"
    }  # fmt: skip
    for said in (
        "# tiny, compressed", "AutoModelForCausalLM.from_pretrained(folder)", "Loss 2.5000 before, 2.7500",
        "opened and run by transformers", "| drop | ", "| prose.txt | +0.2500 |", "license_name: ours",
        "| the original | 10.00 MB |", "| this checkpoint, float32 |", "mixtral checkpoint",
    ):  # fmt: skip
        assert said in card, said
    assert ("in codes, as moecule loads it" in card) == (name == "packed")
    assert ("import moecule" in card) is False  # it loads without


def test_a_card_says_what_is_absent(made, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(made / "pruned", bare)
    (bare / "result.json").unlink()
    (bare / "README.md").unlink()
    export(bare, tmp_path / "out", "transformers")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "figures are absent" in card and "holds no result.json" in card
    assert "| drop | " in card and "has no card that names one" in card
    (bare / "result.json").write_text("{")
    export(bare, tmp_path / "again", "transformers")
    assert "is no result of" in (tmp_path / "again" / "README.md").read_text()


def test_a_stock_folder_that_no_plan_made_is_not_copied(made, tmp_path):
    with pytest.raises(PlanError, match="nothing to export .*copies one that a plan made"):
        export(made / "model", tmp_path / "out", "transformers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "# A model", "---\nlicense: mit", "---\n- a\n---\n", "---\n{\n---\n", "---\na: b\n---\n"]
)  # fmt: skip
def test_a_card_without_a_licence_names_none(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text(head_of({"license": ["mit", "apache-2.0"]}))
    assert licence_of(tmp_path) == {"license": ["mit", "apache-2.0"]}


def test_a_killed_export_leaves_nothing_or_all(made, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_by_transformers", lambda *a: (a[2], "not opened", None))
    here = tmp_path / "here"
    shutil.copytree(made / "packed", here / "packed")

    def work(place: Path) -> None:
        export(place / "packed", place / "out", "transformers")

    status, changes = child(work, here, 0)
    assert status == 0
    wanted = content(here)
    last = f"os.rename {here / '.out.export'}"
    (renamed,) = [n for n, c in enumerate(changes, 1) if c == last]
    for n in (2, renamed // 2, renamed, renamed + 1):
        shutil.rmtree(here / "out", ignore_errors=True)
        assert child(work, here, n)[0] == DIED
        assert (here / "out").exists() == (n > renamed)
        if n > renamed:
            assert content(here / "out") == {
                k.removeprefix("out/"): v for k, v in wanted.items() if k.startswith("out/")
            }
            shutil.rmtree(here / "out")
        work(here)
        assert content(here) == wanted, changes[n - 1]


def test_what_another_run_left_is_not_exported_over(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".stats.partial").mkdir()
    with pytest.raises(OutputError, match="already holds .stats.partial"):
        export(made / "pruned", tmp_path / "out", "transformers")
    (tmp_path / "out" / ".stats.partial").rmdir()
    export(made / "pruned", tmp_path / "out", "transformers")  # an empty folder will do
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
