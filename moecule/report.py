"""report: one HTML file that opens anywhere, and a Markdown twin, of what was done and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from moecule.blocks import Bar, Cell, Page
from moecule.compare import compare_page, difference
from moecule.errors import OutputError
from moecule.figures import depth_section, expert_section
from moecule.files import write_text
from moecule.run import Run, read_runs
from moecule.sections import (
    again_section,
    byte_section,
    cost_section,
    plan_section,
    skip_section,
    speed_section,
    task_section,
    tiles,
    warning_section,
)


def report(folders: Sequence[str | Path], out: str | Path = "report.html") -> tuple[Path, Path]:
    """(the HTML file, the Markdown beside it): what was done to each model, and what it cost.

    `folders`: what compress made, weights or not. Several that were measured alike are compared first.
    Raises DataError or PlanError for a folder that holds no figures, OutputError where `out` cannot be.
    """
    runs = read_runs(list(folders))
    pages = [page_of(run, f"r{k}") for k, run in enumerate(runs)]
    if len(runs) > 1:
        why = difference(runs)
        pages.insert(0, compare_page(runs, "c", why, runs[0]))
    return write_pages(pages, Path(out))


def write_pages(pages: Sequence[Page], out: Path) -> tuple[Path, Path]:
    """The HTML file and the Markdown beside it. Raises OutputError for a name that ends otherwise."""
    if out.suffix != ".html":
        raise OutputError(
            f"{out}: a report is HTML with Markdown beside it; name it like report.html"
        )
    made = (out, out.with_suffix(".md"))
    titles = [page.title for page in pages]
    html = _templates().get_template("report.html")
    write_text(made[0], html.render(pages=pages, title=", ".join(titles[:3])))
    write_text(made[1], markdown(pages))
    return made


def markdown(pages: Sequence[Page]) -> str:
    """The same for a model card, without what is too large for one."""
    return _templates().get_template("report.md").render(pages=pages)


def _templates() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.tests["bar"] = lambda cell: isinstance(cell, Bar)
    env.filters["cell"] = _in_markdown
    return env


def _in_markdown(cell: Cell) -> str:
    text = cell.text if isinstance(cell, Bar) else cell
    return text.replace("|", "\\|").replace("\n", " ")


def page_of(run: Run, key: str) -> Page:
    """About one model; `key` begins the ids of its charts."""
    sections = (
        cost_section(run),
        depth_section(run, key),
        task_section(run),
        expert_section(run, key),
        byte_section(run),
        plan_section(run.plan),
        skip_section(run),
        speed_section(run),
        warning_section(run),
        again_section(run),
    )
    r = run.result
    text = (
        f"{run.plan.model}, compressed by {run.recipe}: {r.nominal_bits:.2f} code bits a routed "
        f"expert's weight, {r.bits_per_weight:.2f} with scales, zero points and padding."
    )
    return Page(f"{Path(run.plan.model).name}, {run.name}", text, tiles(r), sections)
