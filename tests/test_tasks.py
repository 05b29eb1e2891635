"""Tasks: files read and refused; the harness' own numbers equal ours; both models asked alike."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import refused, run

import moecule
from moecule.errors import CheckpointError, DataError, RecipeError
from moecule.plan import Keep
from moecule.session import tokenizer_of
from moecule.suite import asked, is_answer, read_task, task_files

harnessed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="there is no lm-evaluation-harness; pip install 'moecule[eval]'",
)
RECORDS = {
    "quiz": [
        {"ctx": "Question: what is wet?\n", "choices": ["the sea", "a stone"], "gold": 0},
        {"ctx": "Answer in a word. 2 + 2 =", "choices": ["five", "four", "one"], "gold": 1},
        {"ctx": "Is it so?", "choices": ["no", "yes"], "gold": 1},
    ],
    "last": [
        {"ctx": "the cat and the", "target": "cat"},
        {"ctx": "1 + 1 =", "target": " 2"},
        {"ctx": "a red hat, a red", "target": "hat"},
        {"ctx": "", "target": "once"},
    ],
    "who": [
        {"context_options": ["it is Ann who", "it is Bob who"], "continuation": "ran.", "gold": 1},
        {"context_options": ["up the", "down the"], "continuation": "hill", "gold": 0},
    ],
    "grammar": [
        {"good": "The cat sits.", "bad": "The cat sit.", "group": "verb", "field": "x"},
        {"good": "Dogs run.", "bad": "Dogs runs.", "group": "verb"},
        {"good": "An egg.", "bad": "A egg.", "group": "article"},
        {"good": "A hat.", "bad": "An hat.", "group": "article"},
    ],
    "sums": [{"ctx": "How much is 2 and 3?", "target": "5"}, {"ctx": "Say no:", "target": "no"}],
}
ALL = ("quiz", "last", "who", "grammar", "sums:generate")
# the same as a user of the harness writes it, of the raw records
YAMLS = {
    "quiz": """
output_type: multiple_choice
doc_to_text: "{{ctx.rstrip() + '\\nAnswer:' if ctx.rstrip().endswith('?') else ctx}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
""",
    "last": """
output_type: loglikelihood
doc_to_text: ctx
doc_to_target: "{{target if not ctx or target[0] == ' ' else ' ' + target}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    "who": """
output_type: multiple_choice
doc_to_text: gold
doc_to_choice: context_options
doc_to_target: continuation
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "grammar": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{[good, bad]}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "sums": """
output_type: generate_until
doc_to_text: "{{'Question: ' + ctx + '\\nAnswer:' if ctx.endswith('?') else ctx}}"
doc_to_target: target
generation_kwargs: {until: ["\\n"], max_gen_toks: 32, do_sample: false}
process_results: !function answers.score
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
ANSWERS = """
from moecule.suite import is_answer
def score(doc, found):
    return {"exact_match": float(is_answer(found[0], doc["target"]))}
"""


def write(folder: Path, records: dict[str, list]) -> Path:
    """Task files."""
    folder.mkdir(exist_ok=True)
    for name, of in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in of))
    return folder


def write_yamls(folder: Path, files: dict[str, Path], cache: Path) -> Path:
    """What the harness reads itself: {NAME: its file} for names of YAMLS."""
    folder.mkdir()
    (folder / "answers.py").write_text(ANSWERS)
    for name, file in files.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        where = json.dumps({"data_files": {"test": str(file)}, "cache_dir": str(cache)})
        (folder / f"{name}.yaml").write_text(f"{head}dataset_kwargs: {where}\n{YAMLS[name]}")
    return folder


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory):
    """model/, packed/ which rounding made of it, tasks/ and text.txt."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "model").symlink_to(checkpoint("qwen3_moe", tokenizer=True))
    streamed = tiny.stream(folder / "model")
    made = tiny.plan(streamed, lambda i, e: Keep(3, 32))
    tiny.write(streamed, made, folder / "packed", [torch.arange(1, 41)[None]])
    tokenizer_of(folder / "model").save_pretrained(folder / "packed")
    write(folder / "tasks", RECORDS)
    (folder / "text.txt").write_text("the dog ran up a hill with his red hat, and sat. " * 12)
    return folder


@pytest.fixture(scope="module")
def measured(place):
    """(the original's result, the packed model's), over all kinds of task."""
    return moecule.evaluate(
        place / "packed",
        against=place / "model",
        text=[place / "text.txt"],
        length=32,
        suite=moecule.Suite(ALL, place / "tasks"),
        memory="original",
    )


@harnessed
def test_the_harness_own_numbers_of_the_original_are_ours(place, measured, tmp_path):
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = {name: place / "tasks" / f"{name}.jsonl" for name in RECORDS}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yamls = write_yamls(tmp_path / "yaml", files, tmp_path / "cache")
        tasks = TaskManager(include_path=str(yamls), include_defaults=False).load(list(RECORDS))
        lm = HFLM(pretrained=str(place / "model"), dtype="float32", device="cpu", batch_size=8)
        theirs = evaluator.evaluate(lm, tasks, bootstrap_iters=10)["results"]
    ours = measured[0].tasks
    for name in ("quiz", "who"):
        row = {k: v for k, v in ours[name].items() if k != "n"}
        assert row == {k.partition(",")[0]: v for k, v in theirs[name].items() if k in keys(row)}
    assert ours["last"]["acc"] == theirs["last"]["acc,none"]
    assert math.exp(ours["last"]["target_nats"]) == theirs["last"]["perplexity,none"]
    assert ours["grammar"]["acc"] == theirs["grammar"]["acc,none"]  # groups are as large
    assert ours["sums:generate"]["exact_match"] == theirs["sums"]["exact_match,none"]


def keys(row: dict[str, float]) -> set[str]:
    """As the harness names them."""
    return {f"{metric},none" for metric in row}


@harnessed
def test_both_models_are_asked_alike_and_the_change_is_of_the_items(measured):
    before, after = measured
    assert after.original == before and before.tasks
    assert after.suite["lm_eval"] and set(after.suite["files"]) == set(RECORDS)
    assert after.suite["groups"] == {"grammar": ["grammar_verb", "grammar_article"]}
    sizes = {name: row["n"] for name, row in after.tasks.items()}
    assert sizes == {"quiz": 3, "last": 4, "who": 2, "grammar": 4, "grammar_verb": 2,
                     "grammar_article": 2, "sums:generate": 2}  # fmt: skip
    change, lost = after.task_changes["last"], after.tasks["last"]["target_nats"]
    assert lost != before.tasks["last"]["target_nats"]
    assert change["target_nats"] == lost - before.tasks["last"]["target_nats"]
    # the items' own nats differ by far more than what rounding does to any of them
    assert 0 < change["target_nats_stderr"] < after.tasks["last"]["target_nats_stderr"]


@harnessed
def test_a_model_against_itself_changes_nothing_to_the_last_digit(place):
    suite = moecule.Suite(("quiz", "last"), place / "tasks")
    given = {"text": [place / "text.txt"], "length": 32, "suite": suite}
    _, after = moecule.evaluate(place / "model", against=place / "model", **given)
    assert {v for row in after.task_changes.values() for v in row.values()} == {0.0}


@harnessed
def test_as_many_sequences_as_fit_beside_the_weights_decode_at_once(measured):
    before, after = (r.throughput for r in measured)
    assert measured[1].original.throughput == before
    assert (before.sequences, before.context_tokens) == (1, 128)
    assert before.memory_bytes == measured[0].size_bytes + before.sequence_bytes
    assert before.sequence_bytes == after.sequence_bytes  # both keep the same of past tokens
    room = before.memory_bytes - measured[1].size_bytes
    assert after.sequences == room // after.sequence_bytes > 1
    assert after.decode_tokens_per_s > 0 and before.decode_tokens_per_s > 0


def test_a_model_without_room_is_not_timed_and_not_asked(place, monkeypatch):
    monkeypatch.setattr("moecule.whole.fits", lambda streamed: False)
    given = {"text": [place / "text.txt"], "length": 32}
    before, after = moecule.evaluate(
        place / "packed", against=place / "model", memory="original", **given
    )
    assert before.throughput.sequences == 1 < after.throughput.sequences
    assert before.throughput.decode_tokens_per_s is after.decode_tokens_per_s is None
    if importlib.util.find_spec("lm_eval") is not None:
        with pytest.raises(CheckpointError, match="does not fit cpu whole, and tasks need that"):
            moecule.evaluate(place / "model", suite=moecule.Suite(ALL, place / "tasks"), **given)


@harnessed
def test_the_command_prints_what_it_keeps_and_cuts_what_is_too_long(place, tmp_path):
    long = [{"ctx": "a long way " * 20, "target": "home"}, {"ctx": "a short", "target": "way"}]
    tasks = write(tmp_path / "tasks", {"ways": long, **RECORDS})
    text = ("--text", place / "text.txt", "--length", "32")
    names = ("--tasks", "ways,grammar_verb,quiz", "--limit", "2", "--shots", "1")
    cut = "longer than the 128 tokens that the model knows were cut from the left: 1 of ways"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, err = run(
            "evaluate", place / "model", *text, "--task-dir", tasks, *names, "--json"
        )
    assert code == 0 and cut in err
    found = json.loads(out)
    assert {name: row["n"] for name, row in found["tasks"].items()} == {
        "ways": 1,
        "grammar_verb": 1,
        "quiz": 2,
    }
    assert found["suite"]["cut"] == {"ways": 1} and found["suite"]["shots"] == 1
    assert (
        "longer than the 128 tokens that the model knows were cut from the left: 1 of ways" in err
    )
    names = ("--tasks", "who", "--memory", "1MB", "--context", "40")
    code, out, err = run("evaluate", place / "model", *text, "--task-dir", tasks, *names)
    assert code == 0 and "who, acc" in out and "sequences in 1.00 MB" in out


@harnessed
def test_a_tokenizer_of_another_model_is_refused(place, tmp_path):
    (tmp_path / "model").mkdir()
    for file in (place / "model").iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / "model" / file.name).symlink_to(file)
    tokens = json.loads((place / "model" / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["z"] = 5000
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokens))
    settings = (place / "model" / "tokenizer_config.json").read_text()
    (tmp_path / "model" / "tokenizer_config.json").write_text(settings)
    tasks = write(tmp_path / "tasks", {"zoo": [{"ctx": "a", "target": "zoo"}]})
    args = ("--text", place / "text.txt", "--length", "32", "--task-dir", tasks)
    assert "the tokenizer gives token 5000 and the model knows 300; put" in refused(
        tmp_path, "evaluate", tmp_path / "model", *args
    )


@harnessed
@pytest.mark.parametrize(
    ("names", "said"),
    [
        pytest.param(
            *("quizz", "quizz is no task of lm-evaluation-harness, nor a file of .*near it: quiz"),
            marks=pytest.mark.slow,  # the harness looks through all of its files
        ),
        ("quiz:generate", "wanted quiz, or NAME:generate for a file of ctx and target"),
        ("last:aloud", "wanted last, or NAME:generate"),
        ("grammar_noun", "grammar has no group for grammar_noun; it has grammar_"),
        ("grammar,grammar_verb", "Duplicate task 'grammar_verb'.*; name one of them"),
    ],
)
def test_names_that_are_no_tasks_are_refused(place, names, said):
    args = ("--text", place / "text.txt", "--task-dir", place / "tasks", "--tasks", names)
    assert re.search(said, refused(place, "evaluate", place / "model", *args))


@harnessed
def test_a_task_of_the_hub_that_cannot_be_had_is_one_line(place, monkeypatch):
    from moecule import exam

    class Offline:
        all_tasks = ("piqa",)

        def load(self, names):
            raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\nand more")

    monkeypatch.setattr(exam, "TaskManager", Offline)
    args = ("--text", place / "text.txt", "--tasks", "piqa")
    said = refused(place, "evaluate", place / "model", *args)
    assert "task piqa cannot be had (Couldn't reach 'baber/piqa' on the Hub); it needs" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{nope", "line 2: not JSON"),
        ("[1, 2]", "line 2: found .1, 2., wanted the keys of one kind"),
        ('{"ctx": "a"}', "line 2: found .'ctx'., wanted the keys of one kind"),
        ('{"good": "a", "bad": "b"}', "line 2: of kind pairs after choices"),
        ('{"ctx": "a", "choices": ["b"], "gold": 0}', "wanted a list of 2 or more"),
        ('{"ctx": "a", "choices": ["b", ""], "gold": 0}', "choices holds '', wanted text"),
        (
            '{"ctx": "a", "choices": ["b", "c"], "gold": 2}',
            "gold is 2, wanted a number from 0 to 1",
        ),
        ('{"ctx": "a", "choices": ["b", "c"], "gold": true}', "gold is True"),
        ('{"ctx": 5, "choices": ["b", "c"], "gold": 0}', "ctx holds 5, wanted text"),
        ('{"ctx": "\\ud800", "choices": ["b", "c"], "gold": 0}', "is no Unicode text"),
        ('{"ctx": "a", "choices": ["b", "c"], "gold": 0, "group": 1}', "group is 1, wanted text"),
    ],
)
def test_a_damaged_task_file_is_refused_with_its_line(tmp_path, line, said):
    file = tmp_path / "quiz.jsonl"
    file.write_text(json.dumps(RECORDS["quiz"][0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=said):
        read_task(file, "quiz")


def test_folders_and_numbers_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no record"):
        read_task(tmp_path / "empty.jsonl", "empty")
    with pytest.raises(DataError, match="is no folder"):
        task_files(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no task file; wanted one named NAME.jsonl"):
        task_files(tmp_path / "none")
    for how in ({}, {"names": ("piqa",), "limit": 0}, {"names": ("piqa",), "shots": -1}):
        with pytest.raises(RecipeError, match="wanted|give"):
            moecule.Suite(**how)


def test_without_the_harness_the_error_says_what_to_install(place, monkeypatch):
    for name in ["lm_eval", *(n for n in sys.modules if n.startswith("lm_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "moecule.exam", raising=False)
    args = ("--text", place / "text.txt", "--tasks", "piqa")
    said = refused(place, "evaluate", place / "model", *args)
    assert "pip install 'moecule[eval]'" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--limit", "3"), "--limit and --shots are of tasks; give --tasks or --task-dir"),
        (("--memory", "original"), "--memory original needs the original; give --against"),
        (("--memory", "10kB"), "holds not one sequence of 128 tokens beside the model; .* would"),
        (("--memory", "1GB", "--context", "4"), "contexts of 4 tokens are too short to time"),
        (("--memory", "much"), "cannot read the size"),
    ],
)
def test_requests_that_cannot_be_are_refused(place, args, said):
    text = ("--text", place / "text.txt", "--length", "32")
    assert re.search(said, refused(place, "evaluate", place / "model", *text, *args))


def test_what_asks_gets_an_answer_line_and_an_answer_may_go_on():
    (arc,) = asked([{"ctx": "Question: why?", "choices": ["a", "b"], "gold": 0}], "choices")
    assert arc["text"] == "Question: why?\nAnswer: "
    (plain,) = asked([{"ctx": "The sky is", "choices": [" blue", " red"], "gold": 0}], "choices")
    assert plain["text"] == "The sky is"
    (told,) = asked([{"ctx": "How many?", "target": "5"}], "generate")
    assert told["text"] == "Question: How many?\nAnswer:"
    assert is_answer(" 5 apples", "5") and not is_answer("15", "5") and not is_answer("", "5")


@harnessed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral-27m", "qwen3moe-32m"])
def test_the_harness_own_command_says_the_same_of_a_trained_model(name, shared, tmp_path):
    from moecule.exam import prepare
    from moecule.harness import score
    from moecule.session import Compute, load

    kinds = {"piqa": "quiz", "lambada": "last", "winogrande": "who", "svamp": "sums"}
    few = {"blimp": 40} | dict.fromkeys(kinds, 40)
    with tarfile.open(shared / "data" / "eval_tasks.tar.xz") as packed:
        records = {}
        for member in packed.getmembers():
            stem = Path(member.name).stem
            if stem in few:
                lines = packed.extractfile(member).read().decode().split("\n")
                records[stem] = [json.loads(line) for line in lines[: few[stem]]]
    tasks = write(tmp_path / "tasks", records)
    kinds["blimp"] = "grammar"
    for stem, kind in kinds.items():
        YAMLS[stem] = YAMLS[kind]
    YAMLS["piqa"] = YAMLS["quiz"].replace(
        "{{ctx.rstrip() + '\\nAnswer:' if ctx.rstrip().endswith('?') else ctx}}",
        "{{ctx.rstrip()}}\\nAnswer:",
    )
    files = {stem: tasks / f"{stem}.jsonl" for stem in kinds}
    yamls = write_yamls(tmp_path / "yaml", files, tmp_path / "cache")
    model, out = shared / "models" / name, tmp_path / "out"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
               f"pretrained={model},dtype=float32", "--include_path", str(yamls), "--device", "cpu",
               "--tasks", ",".join(kinds), "--batch_size", "8", "--output_path", str(out)]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (said,) = out.rglob("results_*.json")
    theirs = json.loads(said.read_text())["results"]
    names = ("piqa", "lambada", "winogrande", "blimp", "svamp:generate")
    loaded = load(model, Compute("cpu"))
    ours = score(loaded, tokenizer_of(model), prepare(moecule.Suite(names, tasks)), quiet, "").tasks
    for stem in kinds:
        row = ours["svamp:generate" if stem == "svamp" else stem]
        for metric in {*row} - {"n", "target_nats", "target_nats_stderr"}:
            theirs_is = theirs[stem][f"{metric},none"]
            assert row[metric] == theirs_is, (stem, metric)
    mean = ours["lambada"]["target_nats"]
    assert math.exp(mean) == theirs["lambada"]["perplexity,none"]


def quiet(what: str, done: int, of: int, tokens: int) -> None:
    """No progress."""
