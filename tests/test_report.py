"""Reports and comparisons: all numbers are there, old folders say what they lack, browsers are content."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import browser
import conform
import pytest
from test_cli import refused, run

from moecule.compare import compare, readme_table
from moecule.depth import Depth, Sampled, Skipped
from moecule.drawing import Named, Point, front, heat_map
from moecule.errors import DataError
from moecule.evidence import Evidence, ExpertSums, load_evidence, save_evidence
from moecule.measure import Loss
from moecule.plan import Drop, Keep, Merge, Plan, Skip
from moecule.report import page_of, report
from moecule.result import Result, load_result
from moecule.run import read_run

WIDTHS = (1, 2, 3, 4, 5)


def result(plan: Plan, layers: int, loss: float = 2.75) -> Result:
    """As evaluate leaves it."""
    original = Result(
        model="original",
        against=None,
        loss_nats=2.5,
        perplexity=12.2,
        kl_nats=None,
        top1_agreement=None,
        original_loss_nats=None,
        by_file={"prose.txt": Loss(2.5, 1000)},
        window=512,
        size_bytes=10_000_000,
        expert_bytes=8_000_000,
        bits_per_weight=16.0,
        nominal_bits=16.0,
        model_bits_per_weight=16.0,
        bytes_by_part={"experts": 8_000_000, "attention": 2_000_000},
        memory_bytes=20_000_000,
        experts_run=1.0,
        prefill_tokens_per_s=1000.0,
        decode_tokens_per_s=50.0,
        device="CPU",
        dtype="float32",
        digest="0123456789abcdef",
        step_bytes=4e6,
        read_bytes_per_s=4e9,
    )
    depths = tuple(Depth(i, 2.5 + 0.01 * i, 0.01 * i + 0.001, 0.02 * i) for i in range(layers))
    skipped = Skipped({i: 0.8 + 0.001 * i for i in range(layers)}, loss + 0.01, 0.02)
    return replace(
        original,
        model="out",
        against="original",
        loss_nats=loss,
        kl_nats=0.12,
        top1_agreement=0.9,
        original_loss_nats=2.5,
        by_file={"prose.txt": Loss(loss, 1000, 0.12, 0.9, 2.5)},
        size_bytes=3_000_000,
        bytes_by_part={"experts": 2_500_000, "attention": 500_000},
        plan_digest=plan.code_digest,
        text_digests={"prose.txt": "fedcba9876543210"},
        sampled=Sampled(511, 2.5, depths, skipped),
        command="moecule compress original -o out",
        versions={"moecule": "0.1.0"},
        original=original,
    )


def folder(out: Path, layers: int = 2, experts: int = 8, *, loss: float = 2.75) -> Path:
    """A folder that compress could have left, without weights."""
    out.mkdir(parents=True)
    widths = [Keep(WIDTHS[e % 5], 64) for e in range(experts - 2)]
    fates = {i: (*widths, Drop(), Merge(0)) for i in range(layers)}
    made = Plan(
        "original",
        "0123456789abcdef",
        fates,
        skip=Skip({i: (0.25,) for i in range(layers)}),
        made_by={"recipe": "mc", "budget": "2.5 bits"},
    )
    # Merge wants to be told how
    text = made.dumps().replace(
        "layers:\n", "merge: {how: {method: m}, router: rows, weights: {}}\nlayers:\n"
    )
    made = Plan.loads(text)
    (out / "plan.yaml").write_text(made.dumps())
    (out / "result.json").write_text(result(made, layers, loss).dumps())
    count = tuple(float(100 + (7 * e) % 50) for e in range(experts))
    trial = {b: tuple(n / b**3 for n in count) for b in WIDTHS}
    sums = {i: ExpertSums(count, count, trial, 64) for i in range(layers)}
    evidence = Evidence(
        command="moecule compress original -o out --bits 2.5",
        versions={"moecule": "0.1.0"},
        made_of={"tokens": "aaaa", "window": [4, 512]},
        tokens=2048,
        mass="mass",
        trial="fisher",
        experts=sums,
        starved={1: (3,)},
        warnings=("the disk was nearly full",),
    )
    save_evidence(evidence, out)
    return out


class Page(HTMLParser):
    """What is looked for in a report."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labelled: list[list[str]] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.links += [given[a] for a in ("href", "src", "srcset", "action", "data") if a in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag == "svg":
            assert given["role"] == "img"
            self.labelled.append(given["aria-labelledby"].split())


def test_a_report_says_all_and_asks_for_nothing(tmp_path):
    html, markdown = report([folder(tmp_path / "one")], tmp_path / "made" / "report.html")
    text, twin = html.read_text(), markdown.read_text()
    page = Page(text)
    assert [link for link in page.links if not link.startswith(("#", "data:,"))] == []
    assert "script" not in page.tags and "@import" not in text and "url(" not in text
    assert len(page.ids) == len(set(page.ids))  # links and descriptions find what they name
    assert {link[1:] for link in page.links if link[0] == "#"} <= set(page.ids)
    # two lines, and maps of bits, usage, mass and trial error; a table beside each
    assert len(page.labelled) == 6 and all(set(names) <= set(page.ids) for names in page.labelled)
    assert page.tags.count("figure") == 6 and page.tags.count("details") >= 6
    for said in (text, twin):
        for wanted in (
            "+0.2500", "prose.txt", "30.0 %", "attention", "moecule compress original -o out --bits 2.5",
            "fedcba9876543210", "the disk was nearly full", "reached experts 3", "1,000",
            "keep 5bit g64", "20.0 %", "None were measured",
        ):  # fmt: skip
            assert wanted in said, wanted
    assert "in 0" in text and "Trial error" in text  # maps are too large for a model card


def test_every_expert_is_in_the_maps_and_in_their_tables(tmp_path):
    html, _ = report([folder(tmp_path / "one", layers=3, experts=12)], tmp_path / "report.html")
    text = html.read_text()
    for title in ("Bits", "Usage", "Routing mass", "Trial error at 2 bits"):
        table = text.partition(f"<summary>{title}: all numbers")[2].partition("</table>")[0]
        assert table.count("<td>") == 3 * 12 and table.count('scope="row"') == 3


def test_cells_are_where_their_numbers_are():
    svg = heat_map(Named("k", "t", "d"), {0: [0.0, 2.0, 2.0], 5: [None, 1.0, 0.0]}, (0.5, 1.5))
    paths = dict(re.findall(r'<path class="(\w+)" d="([^"]*)"', svg))
    assert paths["k0"] == "M0 0h1v1H0zM2 1h1v1H2z"
    assert paths["k1"] == "M1 1h1v1H1z" and paths["k2"] == "M1 0h2v1H1z"
    assert paths["gone"] == "M0 1h1v1H0z"
    assert ">5</text>" in svg  # the layer's own number


def test_the_front_is_what_no_other_beats():
    at = [Point("a", 1, 5), Point("b", 2, 3), Point("c", 2, 4), Point("d", 3, 3), Point("e", 4, 1)]
    assert [p.name for p in front(at)] == ["a", "b", "e"]
    assert [p.name for p in front(at, more_is_better=True)] == ["e"]


def test_an_old_folder_says_what_it_lacks(tmp_path):
    out = folder(tmp_path / "old")
    (out / "evidence.json").unlink()
    doc = json.loads((out / "result.json").read_text())
    for new in ("digest", "text_digests", "step_bytes", "read_bytes_per_s", "sampled", "command",
                "versions", "original"):  # fmt: skip
        del doc[new]
    (out / "result.json").write_text(json.dumps(doc))
    _, markdown = report([out], tmp_path / "report.html")
    assert len(re.findall(r"absent", markdown.read_text())) >= 6


def test_results_and_evidence_come_back_as_they_were(tmp_path):
    out = folder(tmp_path / "one")
    plan = Plan.loads((out / "plan.yaml").read_text())
    assert load_result(out / "result.json") == result(plan, 2)
    found = load_evidence(out)
    assert found is not None and found.experts[1].trial[2][0] == 12.5 and found.starved == {1: (3,)}


def test_tasks_have_their_errors(tmp_path):
    one = read_run(folder(tmp_path / "one"))
    for of, name, row in (
        (one.result, "tasks", {"acc": 0.6, "acc_stderr": 0.0123, "n": 100}),
        (one.result.original, "tasks", {"acc": 0.7, "acc_stderr": 0.0122, "n": 100}),
        (one.result, "task_changes", {"acc": -0.1, "acc_stderr": 0.003, "n": 100}),
    ):
        object.__setattr__(of, name, {"piqa": row})
    section = next(s for s in page_of(one, "k").sections if s.title == "Tasks")
    rows = section.tables[0].rows
    spread = ("0.7000 \u00b1 0.0122", "0.6000 \u00b1 0.0123", "-0.1000 \u00b1 0.0030")
    assert rows == (("piqa", *spread, "acc", "100"),)


def test_models_are_compared(tmp_path):
    a = folder(tmp_path / "a")
    b = folder(tmp_path / "b", loss=2.6)
    code, out, err = run("compare", a, b, "-o", tmp_path / "compare.html")
    assert code == 0, err
    page = (tmp_path / "compare.html").read_text()
    assert "b *" in page and "a *" not in page and page.count("<svg") == 2
    assert [r.name for r in compare([a, b]).runs] == ["b", "a"]
    assert re.search(r"^A  b \*  +\+0\.1000 .*^B  a  +\+0\.2500", out, re.MULTILINE | re.DOTALL)
    assert re.search(r"0\.2500 \|B", out)  # as large as the other
    code, out, err = run("compare", a, b, "--json")
    assert code == 0 and [one["loss_nats"] for one in json.loads(out)] == [2.6, 2.75]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_digests": {"prose.txt": "0" * 16}}, "the text"),
        ({"window": 256}, "the window"),
        ({"dtype": "bfloat16"}, "the dtype"),
        ({"device": "GPU"}, "the device"),
        ({"text_digests": {}}, "which text"),
    ],
)
def test_what_was_measured_differently_is_not_compared(tmp_path, change, said):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b")
    doc = json.loads((b / "result.json").read_text()) | change
    (b / "result.json").write_text(json.dumps(doc))
    assert said in refused(tmp_path, "compare", a, b)
    _, markdown = report([a, b], tmp_path / "report.html")  # each by itself
    assert said in markdown.read_text() and "Not compared" in markdown.read_text()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("result.json", "{", "is no result"),
        ("result.json", None, "holds no result.json"),
        ("result.json", '{"by_file": 3}', "is no result"),
        ("plan.yaml", None, "holds no plan.yaml"),
        ("plan.yaml", "a: [", "plan"),
        ("evidence.json", "[]", "is damaged"),
        ("evidence.json", '{"experts": {}, "starved": {}, "warnings": []}', "is damaged"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, name, text, said):
    out = folder(tmp_path / "one")
    (out / name).unlink() if text is None else (out / name).write_text(text)
    assert said in refused(tmp_path, "report", out, "-o", tmp_path / "report.html")


def test_an_edited_plan_is_not_reported_as_what_was_measured(tmp_path):
    out = folder(tmp_path / "one")
    file = out / "plan.yaml"
    file.write_text(file.read_text().replace("keep 1bit g64", "keep 8bit g64"))
    with pytest.raises(DataError, match="another plan"):
        report([out], tmp_path / "report.html")


def test_a_report_is_html(tmp_path):
    out = folder(tmp_path / "one")
    assert "name it like report.html" in refused(tmp_path, "report", out, "-o", tmp_path / "a.pdf")


def test_the_readme_has_the_results_that_were_committed():
    assert conform.RESULTS.search(conform.README.read_text())[0] == readme_table(conform.MEASURED)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """The report of 48 layers of 128 experts, and of a small model, compared."""
    place = tmp_path_factory.mktemp("large")
    folders = [folder(place / "large", 48, 128), folder(place / "small", loss=2.6)]
    return report(folders, place / "report.html")[0]


def test_a_report_of_many_experts_is_small(large):
    assert large.stat().st_size < 3_000_000


@pytest.mark.skipif(browser.found() is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_has_nothing_to_complain_of(large):
    program = browser.found()
    assert program is not None
    seconds = []
    with browser.browser(program) as one:
        for width, dark in ((1280, False), (390, False), (390, True)):
            start = time.perf_counter()
            one.open(large, width, dark=dark)
            seconds.append(time.perf_counter() - start)
            assert one.requests() == [large.resolve().as_uri()] and one.complaints() == []
            for opened in (False, True):  # all that is folded, too
                each = f"d => d.open = {str(opened).lower()}"
                one.value(f"document.querySelectorAll('details').forEach({each})")
                assert one.value("document.documentElement.scrollWidth") <= width
            back = one.value("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", back))) < 3 * 128) == dark
    assert min(seconds) < 2  # the first time it is still starting, and machines are slow in turns
