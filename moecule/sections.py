"""The sections of a report that are tables: what a model cost, weighs and takes, and its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moecule.blocks import Bar, Cell, Section, Table, Tile
from moecule.budget import format_size
from moecule.paired import gap
from moecule.plan import Keep, Plan, Skip
from moecule.result import Result, in_groups, shown
from moecule.run import Run

PARTS = {
    "experts": "routed experts",
    "attention": "attention",
    "shared": "shared experts",
    "dense": "dense layers",
    "router": "routers",
    "embeddings": "embeddings and head",
    "other": "norms and the rest",
}
AGAIN = "Run: moecule evaluate OUT --against MODEL"


def tiles(r: Result) -> tuple[Tile, ...]:
    """The first figures to see."""
    before = r.original
    size = format_size(r.size_bytes)
    if before is None:
        found = [Tile("size", size), Tile("loss", f"{r.loss_nats:.4f}", "nats a token")]
    else:
        share = r.size_bytes / before.size_bytes
        found = [
            Tile("size", f"{100 * share:.0f} %", f"{format_size(before.size_bytes)} to {size}"),
            Tile("added loss", f"{r.loss_nats - before.loss_nats:+.4f}", "nats a token"),
        ]
    found.append(Tile("true bits", f"{r.bits_per_weight:.2f}", "a routed expert's weight"))
    note = "" if before is None else f"from {before.perplexity:.2f}"
    found.append(Tile("perplexity", f"{r.perplexity:.2f}", note))
    if r.kl_nats is not None and r.top1_agreement is not None:
        found.append(Tile("KL", f"{r.kl_nats:.4f}", "nats a token, to the original"))
        found.append(Tile("same token", f"{100 * r.top1_agreement:.1f} %", "likeliest next"))
    return tuple(found)


def cost_section(run: Run) -> Section:
    """Loss and KL by text."""
    r = run.result
    added = [x.loss_nats - x.original_loss_nats for x in r.by_file.values() if x.original_loss_nats]
    most = max(map(abs, added), default=0.0)
    rows = [_text_row(name, loss, most) for name, loss in r.by_file.items()]
    head = ("text", "added loss", "KL", "original", "compressed", "same token", "tokens")
    text = (
        f"Loss in nats a token on text that calibration did not see, in windows of {r.window} tokens, "
        f"each cold; {r.dtype}. Experts run: {100 * r.experts_run:.1f} % of the pairs."
    )
    if r.original is not None:
        found = gap(r.by_file, r.original.by_file)
        text += f" Added: {found} nats" + (
            ", the 95 % interval over windows." if found.half is not None else "."
        )
    notes = () if r.original is not None else (f"The original's figures are absent. {AGAIN}",)
    return Section("What it cost", text, (), (Table.of("By text", head, rows),), notes)


def _text_row(name: str, loss: Any, most: float) -> tuple[Cell, ...]:
    if loss.original_loss_nats is None:
        return (name, "", "", "", f"{loss.loss_nats:.4f}", "", f"{loss.tokens:,}")
    added = loss.loss_nats - loss.original_loss_nats
    return (
        name,
        Bar(f"{added:+.4f}", abs(added) / (most or 1), "worse" if added > 0 else "better"),
        f"{loss.kl_nats:.4f}",
        f"{loss.original_loss_nats:.4f}",
        f"{loss.loss_nats:.4f}",
        f"{100 * loss.top1_agreement:.1f} %",
        f"{loss.tokens:,}",
    )


def task_section(run: Run) -> Section:
    """As result.json has them: {task: {metric: value, metric_stderr: value, n: items}}."""
    found, inside = run.result.tasks, in_groups(run.result)
    if not found:
        absent = "None were measured. Run: moecule evaluate OUT --against MODEL --tasks NAMES"
        return Section("Tasks", notes=(absent,))
    head = ("task", "original", "compressed", "change", "metric", "items")
    tables = [
        Table.of("Tasks", head, _task_rows(run.result, [t for t in found if t not in inside]))
    ]
    if inside:
        each = _task_rows(run.result, [t for t in found if t in inside])
        tables.append(Table.of("The tasks that groups are means of", head, each, folded=True))
    text = (
        "The number after \u00b1 is one standard error; that of a change, where it has one, is of the "
        "items' own differences."
    )
    return Section("Tasks", text, (), tuple(tables))


def _task_rows(result: Result, tasks: Sequence[str]) -> list[tuple[Cell, ...]]:
    theirs = {} if result.original is None else result.original.tasks
    changes = result.task_changes
    rows: list[tuple[Cell, ...]] = []
    for task in tasks:
        metrics, was = result.tasks[task], theirs.get(task, {})
        for metric, value in metrics.items():
            if metric == "n" or metric.endswith("_stderr"):
                continue
            change = shown(changes[task], metric, "+") if task in changes else ""
            if not change and metric in was:
                change = f"{value - was[metric]:+.4f}"
            n = f"{metrics['n']:g}" if "n" in metrics else ""
            rows.append((task, shown(was, metric), shown(metrics, metric), change, metric, n))
    return rows


def byte_section(run: Run) -> Section:
    """Before and after."""
    r, before = run.result, run.result.original
    of = r.bytes_by_part if before is None else before.bytes_by_part
    most = max(of.values())
    rows: list[tuple[Cell, ...]] = []
    for part, size in r.bytes_by_part.items():
        was = 0 if before is None else before.bytes_by_part.get(part, 0)
        if not size and not was:
            continue
        row: list[Cell] = [PARTS.get(part, part)]
        if before is not None:
            row.append(Bar(format_size(was), was / most, "plain"))
        row.append(Bar(format_size(size), size / most))
        if before is not None:
            row.append(f"{100 * size / was:.1f} %" if was else "")
        rows.append(tuple(row))
    total: list[Cell] = ["all"]
    if before is not None:
        total += [format_size(before.size_bytes), format_size(r.size_bytes)]
        total.append(f"{100 * r.size_bytes / before.size_bytes:.1f} %")
    else:
        total.append(format_size(r.size_bytes))
    head = ("part", "original", "compressed", "left") if before else ("part", "compressed")
    text = (
        f"On disk, counted on the headers of the files: {r.model_bits_per_weight:.2f} bits a weight over "
        "the whole model."
    )
    return Section("Bytes by part", text, (), (Table.of("Bytes", head, [*rows, tuple(total)]),))


def plan_section(plan: Plan) -> Section:
    """What the plan decides, and the plan itself."""
    fates: dict[str, int] = {}
    for of in plan.layers.values():
        for fate in of:
            name = str(fate) if isinstance(fate, Keep) else str(fate).split()[0]
            fates[name] = fates.get(name, 0) + 1
    total = sum(fates.values())
    order = sorted(fates.items(), key=lambda item: -item[1])
    rows = [(name, Bar(f"{n}", n / total), f"{100 * n / total:.1f} %") for name, n in order[:24]]
    if len(order) > 24:
        left = sum(n for _, n in order[24:])
        rows.append(
            (
                f"{len(order) - 24} others",
                Bar(f"{left}", left / total),
                f"{100 * left / total:.1f} %",
            )
        )
    rest = [(part, str(keep)) for part, keep in plan.rest.items()]
    encode = ", ".join(f"{k} {v}" for k, v in plan.encode.items())
    return Section(
        "The plan",
        f"Rounding: {encode}. A plan is text: edit plan.yaml and apply it again.",
        (),
        (
            Table.of("What becomes of experts", ("outcome", "experts", "share"), rows),
            Table.of("Of the rest", ("part", "outcome"), rest),
        ),
        code=plan.dumps(),
    )


def skip_section(run: Run) -> Section:
    """Share of pairs that online skipping leaves out."""
    title = "Online skipping"
    sampled = run.result.sampled
    if run.plan.skip is None:
        return Section(title, notes=("The plan has no rule: every pair of token and expert runs.",))
    if sampled is None or sampled.skipped is None:
        return Section(title, notes=(f"The rule's rates by layer are absent. {AGAIN}",))
    skip, last = sampled.skipped, sampled.depths[-1]
    rule, rows = run.plan.skip, []
    for layer, run_share in skip.experts_run.items():
        left_out = 1 - run_share
        said = "learnt"
        if isinstance(rule, Skip):
            said = " ".join(f"{t:g}" for t in rule.thresholds.get(layer, ())) or "none"
        rows.append((str(layer), Bar(f"{100 * left_out:.1f} %", left_out), said))
    mean = 1 - sum(skip.experts_run.values()) / len(skip.experts_run)
    text = (
        f"Of a sample of {sampled.tokens} tokens {100 * mean:.1f} % of the pairs of token and expert are "
        f"left out when skipping is on; the loss on it is {skip.loss_nats:.4f} nats a token with "
        f"skipping, {last.loss_nats:.4f} without, {sampled.loss_nats:.4f} of the original."
    )
    head = ("layer", "left out", "thresholds" if isinstance(rule, Skip) else "masks")
    return Section(title, text, (), (Table.of("Left out by layer", head, rows),))


def speed_section(run: Run) -> Section:
    """With the device, and the floor of decoding."""
    r, before = run.result, run.result.original
    both = [x for x in (before, r) if x is not None]
    head = ("", *(("original",) if before else ()), "compressed")
    rows: list[tuple[Cell, ...]] = [
        ("prompt, tokens/s", *(_rate(x.prefill_tokens_per_s) for x in both)),
        ("decoded, tokens/s", *(_rate(x.decode_tokens_per_s) for x in both)),
        ("floor: decoded, tokens/s at most", *(_rate(_most(x)) for x in both)),
        ("weights in memory", *(format_size(x.memory_bytes) for x in both)),
    ]
    if before is not None and before.throughput is not None and r.throughput is not None:
        held, room = (before.throughput, r.throughput), format_size(r.throughput.memory_bytes)
        rows.append((f"sequences at once in {room}", *(f"{t.sequences}" for t in held)))
        rows.append(
            ("decoded tokens/s of all of them", *(_rate(t.decode_tokens_per_s) for t in held))
        )
    tables = [Table.of(f"On {r.device}, {r.dtype}", head, rows)]
    peak = [
        (f"peak memory, {where}", format_size(n)) for where, n in r.peak_memory_bytes.items() if n
    ]
    spent = [(verb, f"{s:,.1f} s") for verb, s in r.seconds.items()]
    if peak or spent:
        tables.append(Table.of("Making it took", ("what", "how much"), [*spent, *peak]))
    notes = [
        "One sequence; decoding token by token. What does not fit the device whole is not timed."
    ]
    if _most(r) is None:
        notes.append(f"The floor is absent. {AGAIN}")
    else:
        notes.append(
            "The floor is the time to read the weights that a token needs (of the experts as many as are "
            "picked) at the rate at which this device reads a large tensor, "
            f"{(r.read_bytes_per_s or 0) / 1e9:.1f} GB/s."
        )
    return Section("Speed and memory", "", (), tuple(tables), tuple(notes))


def _most(r: Result) -> float | None:
    if r.step_bytes is None or r.read_bytes_per_s is None:
        return None
    return r.read_bytes_per_s / r.step_bytes


def _rate(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def warning_section(run: Run) -> Section:
    """What is not as it should be."""
    notes = []
    if run.evidence is None:
        notes.append("What compress had to say is absent: the folder has no evidence.json.")
    else:
        for layer, ids in run.evidence.starved.items():
            names = ", ".join(map(str, ids))
            notes.append(
                f"Layer {layer}: no calibration token reached experts {names}; rounded to nearest."
            )
        notes += run.evidence.warnings
    for layer, of in run.experts.items():
        few = [e for e, n in enumerate(of.count) if n == 0]
        if few and (run.evidence is None or layer not in run.evidence.starved):
            notes.append(
                f"Layer {layer}: the calibration text never used experts {', '.join(map(str, few))}."
            )
    return Section("Warnings", notes=tuple(notes) or ("None.",))


def again_section(run: Run) -> Section:
    """Commands, digests and versions."""
    r, plan, evidence = run.result, run.plan, run.evidence
    made = None if evidence is None else evidence.command
    commands = list(dict.fromkeys(c for c in (made, r.command) if c is not None))
    rows = [("original", r.original.digest if r.original and r.original.digest else plan.digest)]
    rows += [("plan", plan.code_digest), ("compressed checkpoint", r.digest or "absent")]
    if evidence is not None:
        rows.append(("calibration tokens", str(evidence.made_of.get("tokens", "absent"))))
        window = evidence.made_of.get("window")
        if window:
            rows.append(("calibration windows", f"{window[0]} of {window[1]} tokens at most"))
    rows += [(f"text {name}", digest) for name, digest in r.text_digests.items()]
    if not r.text_digests:
        rows.append(("text", "absent"))
    versions = evidence.versions if evidence is not None else r.versions
    tables = [Table.of("Digests", ("of", "sha256, begins"), rows)]
    if versions:
        tables.append(Table.of("Versions", ("what", "version"), list(versions.items())))
    notes = (
        ()
        if commands
        else ("No command line was noted: functions were called, or it is an old folder.",)
    )
    return Section("To repeat it", "", (), tuple(tables), notes, "\n".join(commands))
