"""The model card of a stock checkpoint that export writes: what it was made of, how, and what it cost."""

from __future__ import annotations

from pathlib import Path

from moecule.blocks import Page, Section, Table
from moecule.budget import format_size
from moecule.checkpoint import Checkpoint
from moecule.errors import DataError, PlanError
from moecule.hf import PACKED, auto_name
from moecule.licence import head_of, licence_of
from moecule.order import read_plan
from moecule.plan import Plan
from moecule.report import markdown
from moecule.run import Run, read_run
from moecule.sections import (
    again_section,
    cost_section,
    plan_section,
    task_section,
    warning_section,
)


def card(source: Checkpoint, model_type: str, size_bytes: int, dtype: str, checked: str) -> str:
    """Markdown, with what the Hub reads at its head.

    `source`: what was exported; `model_type`, `size_bytes` and `dtype`: of what was written; `checked`:
    who opened it. What cannot be read beside the source is said to be absent.
    """
    licence, run, absent = licence_of(source.path), None, ""
    try:
        run = read_run(source.path)
    except (DataError, PlanError) as e:
        absent = str(e)
    plan = _plan(source.path) if run is None else run.plan
    of = source.name if plan is None else plan.model
    page = Page(
        f"{Path(of).name}, compressed",
        _said(of, plan, run),
        (),
        tuple(
            [
                _loading(model_type, checked),
                _sizes(source, run, size_bytes, dtype),
                *_measured(run, absent),
                *([] if plan is None else [plan_section(plan)]),
                *([] if run is None else [warning_section(run), again_section(run)]),
                Section("Licence", _licence(licence)),
            ]
        ),
    )
    return head_of({"library_name": "transformers", **licence}) + "\n" + markdown([page])


def _plan(folder: Path) -> Plan | None:
    try:
        return read_plan(folder / "plan.yaml")
    except PlanError:
        return None


def _said(of: str, plan: Plan | None, run: Run | None) -> str:
    """In a sentence."""
    if plan is None:
        return f"Made by moecule from `{of}`; no plan beside it says how."
    how = plan.made_by.get("recipe", "by hand")
    asked = plan.made_by.get("budget")
    text = f"Made by moecule from `{of}` ({plan.digest}): {how}{f', {asked}' if asked else ''}."
    if run is not None and run.result.original is not None:
        before, after = run.result.original.loss_nats, run.result.loss_nats
        text += f" Loss {before:.4f} before, {after:.4f} nats a token after."
    return text


def _loading(model_type: str, checked: str) -> Section:
    auto = auto_name(model_type)
    code = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained(folder)"
    text = f"A stock {model_type} checkpoint: it needs nothing of moecule. It was {checked}."
    return Section("To load it", text, code=code)


def _sizes(source: Checkpoint, run: Run | None, size_bytes: int, dtype: str) -> Section:
    rows = []
    if run is not None and run.result.original is not None:
        rows.append(("the original", format_size(run.result.original.size_bytes)))
    packed = source.config["model_type"] == PACKED
    if packed:
        rows.append(("in codes, as moecule loads it", format_size(source.size_bytes)))
    rows.append((f"this checkpoint, {dtype}", format_size(size_bytes)))
    text = ""
    if packed:
        text = (
            "Weights that were rounded are here as the numbers that their codes stand for. So the loss is "
            "that of the codes, and the size is not."
        )
    return Section("Size", text, (), (Table.of("Of all tensors", ("", "size"), rows),))


def _measured(run: Run | None, absent: str) -> list[Section]:
    if run is None:
        return [Section("What it cost", notes=(f"Its figures are absent: {absent}.",))]
    return [cost_section(run), *([task_section(run)] if run.result.tasks else [])]


def _licence(licence: dict[str, object]) -> str:
    if not licence:
        return "The original has no card that names one; its terms hold for this model too."
    said = ", ".join(f"{key}: {value}" for key, value in licence.items())
    return f"As the original's card says ({said})."
