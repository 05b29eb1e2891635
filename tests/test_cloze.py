"""Tasks made of held-out text: what they ask, the same bytes twice, and what is refused."""

from __future__ import annotations

import json
import random
import re

import pytest
from test_cli import refused

import moecule
from moecule.cloze import LETTERS, NEXT_WORDS, WORDS
from moecule.errors import DataError, OutputError, RecipeError
from moecule.suite import read_task

LEXICON = ["river", "stone", "lantern", "garden", "copper", "violin", "harbor", "meadow"]


def text(n: int, seed: int = 0) -> str:
    """Sentences of few words, so that they come again."""
    draw = random.Random(seed)
    words = [draw.choice(LEXICON) + draw.choice(["", "", "", ",", ".", "?"]) for _ in range(n)]
    return "".join(w + draw.choice([" ", " ", " ", "\n"]) for w in words)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two texts, and the tasks made of them."""
    folder = tmp_path_factory.mktemp("cloze")
    for name, seed in (("one", 1), ("two", 2)):
        (folder / f"{name}.txt").write_text(text(3000, seed))
    given = [folder / "one.txt", folder / "two.txt"]
    return given, moecule.cloze(given, folder / "tasks", items=20)


def test_the_last_word_of_a_passage_has_occurred_in_it(files):
    given, made = files
    assert made.items == {f"{n}_{k}": 20 for n in ("one", "two") for k in ("cloze", "next")}
    whole = given[0].read_text()
    task = read_task(made.folder / "one_cloze.jsonl", "one_cloze")
    assert task.kind == "cloze"
    for record in task.records:
        assert f"{record['ctx']} {record['target']}" in whole
        assert len(record["ctx"].split()) == WORDS and record["ctx"][-1] != "?"
        assert record["target"] in re.findall(r"\w+", record["ctx"])
        assert len(record["target"]) >= LETTERS


def test_what_goes_on_is_the_texts_own_and_the_others_lie_elsewhere(files):
    given, made = files
    whole = given[0].read_text()
    task = read_task(made.folder / "one_next.jsonl", "one_next")
    assert {record["gold"] for record in task.records} == {0, 1, 2, 3}
    for record in task.records:
        right = record["choices"][record["gold"]]
        assert f"{record['ctx']} {right}" in whole
        assert len(set(record["choices"])) == 4
        assert {len(c.split()) for c in record["choices"]} == {NEXT_WORDS}
        for wrong in set(record["choices"]) - {right}:
            assert wrong in whole and f"{record['ctx']} {wrong}" not in whole


def test_passages_do_not_overlap(files):
    given, made = files
    whole = given[0].read_text()
    records = read_task(made.folder / "one_cloze.jsonl", "one_cloze").records
    begins = sorted(whole.index(r["ctx"]) for r in records)
    ends = sorted(whole.index(r["ctx"]) + len(r["ctx"]) for r in records)
    assert all(end < begin for end, begin in zip(ends[:-1], begins[1:], strict=True))


def test_the_same_seed_gives_the_same_bytes_and_another_is_not_written_over(files, tmp_path):
    given, made = files
    again = moecule.cloze(given, made.folder, items=20)
    other = moecule.cloze(given, tmp_path, items=20, seed=1)
    assert again == made
    for name in made.items:
        assert (made.folder / f"{name}.jsonl").read_bytes() != (
            other.folder / f"{name}.jsonl"
        ).read_bytes()
    with pytest.raises(OutputError, match="holds another task; name another folder"):
        moecule.cloze(given, made.folder, items=20, seed=1)


def test_documents_of_json_lines_are_read_and_few_items_are_told(tmp_path):
    lines = [json.dumps({"text": text(400, seed)}) for seed in range(4)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match="fewer items than 500: docs_cloze 12, docs_next 12"):
        made = moecule.cloze([tmp_path / "docs.jsonl"], tmp_path / "tasks")
    assert made.items == {"docs_cloze": 12, "docs_next": 12}


@pytest.mark.parametrize(
    ("given", "how", "error", "said"),
    [
        (["short.txt"], {}, DataError, "is too short to make a task of; give more text"),
        (["long.txt", "sub/long.txt"], {}, DataError, "each of another name"),
        ([], {}, DataError, "give one or more"),
        (["long.txt"], {"items": 0}, RecipeError, "0 items were asked for; wanted 1 or more"),
        (["none.txt"], {}, DataError, "cannot be read as text"),
    ],
)
def test_what_makes_no_task_is_refused(tmp_path, given, how, error, said):
    (tmp_path / "short.txt").write_text(text(200))
    (tmp_path / "long.txt").write_text(text(2000))
    with pytest.raises(error, match=said):
        moecule.cloze([tmp_path / g for g in given], tmp_path / "tasks", **how)
    assert not (tmp_path / "tasks").exists()


def test_a_folder_that_holds_other_things_is_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    (tmp_path / "text.txt").write_text(text(2000))
    args = ("cloze", tmp_path / "text.txt", "-o", tmp_path / "full", "--items", "4")
    assert "already holds a.txt; name another folder" in refused(tmp_path, *args)
