"""Whose domain is a prompt of, and what does it cost to load that domain's experts alone?

    python -m experiments.patterns.measure MODEL ... --data TRAIN.jsonl.xz --text VAL/*.txt
        [--samples 64] [--windows 100] [--pairs 6] [-o RESULTS.json]
    python -m experiments.patterns.measure --tables RESULTS.json      this folder's README.md anew

Patterns are made of train text, domain by domain. Prompts are the windows of held-out text (and, where
the rule was chosen, of train text that the patterns have not seen). Loss is measured on the window after
the prompt: with all experts, with those of the task that was found, of the prompt's own task, and of all
domains together (the sums of all domains added up). Memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cases import by_domain
from moecule.calibrate import collect
from moecule.data import Sampling, all_windows, held_out_windows, read_text, sample_windows
from moecule.hf import Streamed
from moecule.measure import device_name, window_losses
from moecule.method import load_method
from moecule.moe import experts_of, find_layers, find_moe, put_experts, select_experts
from moecule.pattern import SEEN, Patterns, Task, chosen, distances, task_of
from moecule.recipe import load_recipe
from moecule.session import Compute, load, stream, tokenizer_of
from moecule.taer import first_logits, room_of

HERE = Path(__file__).parent
COMPUTE = Compute(device="cpu", dtype="float32")
WINDOW, HELD_OUT = 512, 64
RULES = ("tcess", "spread")
SHARES = (0.25, 0.5)
SCORES = ("premoe", "easy_ep")
POOLED = "all domains"


HEAD = """# Task patterns: whose domain is a prompt of

    python -m experiments.patterns.measure {models} --data text/train_sample.jsonl.xz
        --text text/val/{{prose,techdoc,python,c,maths,multilingual}}.txt
        -o experiments/patterns/results.json
    python -m experiments.patterns.measure --tables experiments/patterns/results.json

(the first as one line.) PreMoe's retrieval (TAER, arXiv:2505.17639). Patterns of six domains,
{samples} windows of 512 tokens of train text each; {windows} prompts of 512 tokens a domain from
held-out text, float32, {device}. `tcess` is the paper's match, `spread` ours (moecule/pattern.py),
chosen among some forty kinds of match by train text that patterns had not seen ("on train text": 64
prompts a domain of such text). Intervals are of 95 %. Loss is of the 512 tokens after the prompt,
{pairs} a domain, each such window by itself, over that of the whole model, by which experts are kept;
"{pooled}" adds up the sums of all six and keeps as many. Memory is of a process of its own: the sum
of its parameters, what it gave back when the model went, and the most that it had beyond what it had
before, files mapped into it counted.

{said}
"""
SAID = """The paper's match is right for 78 % of the prompts on both models, ours for 94 % (qwen3moe-32m)
and 90 % (mixtral-27m); the domain that both miss most is techdoc. The experts that ours finds lose at most
0.016 nats more than those of the prompt's own task, and 0.15 to 1.15 less than as many chosen for all
domains together. The exception is `easy_ep` with 4 of 8 on mixtral-27m, where even the own task is no
better than all domains together. Memory falls by the weights that are not loaded. A domain's prompts are
one file cut up, so neighbours may be of one document."""


def sums_of(streamed: Streamed, windows: Tensor) -> dict[int, dict[str, Tensor]]:
    """What all the scores read, and SEEN, of one domain."""
    needs = [s for name in SCORES for s in load_recipe(name).needs()]
    return dict(collect(streamed, list(windows.split(1)), tuple(dict.fromkeys((*needs, *SEEN)))))


def added(many: list[dict[int, dict[str, Tensor]]]) -> dict[int, dict[str, Tensor]]:
    """Of several domains together."""
    first = many[0]
    return {
        i: {n: torch.stack([m[i][n] for m in many]).sum(0) for n in of} for i, of in first.items()
    }


def tasks_of(sums: dict[str, Any], samples: dict[str, int], recipe: str) -> tuple[Task, ...]:
    """As moecule.patterns makes them, and one of all domains together, last."""
    part = load_recipe(recipe).score
    assert part is not None
    score = load_method(part.method, "score").score
    assert score is not None
    made = []
    for name, of in {**sums, POOLED: added(list(sums.values()))}.items():
        scores = [s for _, s in sorted(score(of, part.options).items())]
        n = samples.get(name, sum(samples.values()))
        made.append(task_of(name, n, of[min(of)], scores))
    return tuple(made)


def confusion(
    patterns: Patterns, prompts: dict[str, list[Tensor]]
) -> dict[str, dict[str, dict[str, int]]]:
    """{rule: {domain: {task found: prompts}}} of the prompts' first logits."""
    out: dict[str, dict[str, dict[str, int]]] = {}
    for rule in RULES:
        out[rule] = {}
        for domain, logits in prompts.items():
            found = [next(iter(distances(patterns, z, rule))) for z in logits]
            out[rule][domain] = {t.name: found.count(t.name) for t in patterns.tasks}
    return out


def right(table: dict[str, dict[str, int]]) -> float:
    """The mean over domains of the share of prompts that found their own."""
    return float(np.mean([of[domain] / sum(of.values()) for domain, of in table.items()]))


def with_experts(model: Any, streamed: Streamed, task: Task, n: int) -> Any:
    """A copy that has the task's experts alone, as taer.retrieve loads them."""
    model = copy.deepcopy(model)
    layers, at = find_layers(model)[1], 0
    for i, layer in enumerate(layers):
        moe, room = find_moe(layer, streamed.family), room_of(streamed, i)
        if moe is not None and room is not None:
            kept = chosen(task.ranks[at], n, room)
            put_experts(moe.experts, experts_of(moe.experts).select(kept))
            select_experts(moe, kept, room.n)
            at += 1
    return model


def losses(model: Any, windows: list[Tensor]) -> list[float]:
    """Of each window, nats a token."""
    if not windows:
        return []
    return [float(x) for x in window_losses(model, torch.stack(windows))]


def costs(
    model: Any,
    streamed: Streamed,
    tasks: tuple[Task, ...],
    found: dict[str, dict[str, list[str]]],
    after: dict[str, list[Tensor]],
    n: int,
) -> dict[str, dict[str, list[float]]]:
    """{row: {domain: loss of each window}} with n experts a layer."""
    rows: dict[str, dict[str, list[float]]] = defaultdict(dict)
    by: dict[str, dict[str, list[float]]] = defaultdict(dict)  # {task: {domain: all its windows}}
    wanted: dict[str, set[str]] = {t.name: {t.name} for t in tasks} | {POOLED: set(after)}
    for rule in RULES:
        for domain, names in found[rule].items():
            for name in names:
                wanted[name].add(domain)
    for task in tasks:
        cut = with_experts(model, streamed, task, n)
        for domain in sorted(wanted[task.name] & set(after)):
            by[task.name][domain] = losses(cut, after[domain])
    for domain in after:
        rows["own task"][domain] = by[domain][domain]
        rows[POOLED][domain] = by[POOLED][domain]
        for rule in RULES:
            rows[f"found by {rule}"][domain] = [
                by[name][domain][w] for w, name in enumerate(found[rule][domain])
            ]
    return dict(rows)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    start, streamed = time.perf_counter(), stream(name, COMPUTE)
    tokenizer = tokenizer_of(streamed.checkpoint.path)
    docs, sampling = by_domain(args.data), Sampling(args.samples, WINDOW, 1)
    whole_texts = {t.stem: all_windows(tokenizer, [read_text(t)], WINDOW) for t in args.text}
    texts = {domain: windows[: args.windows] for domain, windows in whole_texts.items()}
    assert sorted(texts) == sorted(docs)  # the same domains
    train = {d: sample_windows(tokenizer, of, sampling, WINDOW) for d, of in docs.items()}
    other = {
        d: held_out_windows(tokenizer, of, sampling, WINDOW, HELD_OUT) for d, of in docs.items()
    }
    sums = {}
    for domain, windows in train.items():
        sums[domain] = sums_of(streamed, windows)
        print(f"{name} {domain}: {time.perf_counter() - start:.0f} s", flush=True)
    samples = {d: len(w) for d, w in train.items()}
    stores = {recipe: tasks_of(sums, samples, recipe) for recipe in SCORES}
    patterns = Patterns(name, streamed.checkpoint.digest, stores["premoe"][:-1], {})

    def logits_of(windows: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        return {d: [first_logits(streamed, w[None]) for w in of] for d, of in windows.items()}

    heard = logits_of(texts)
    tables = confusion(patterns, heard)
    chosen_on = confusion(patterns, logits_of(other))
    print(f"{name} matched: {time.perf_counter() - start:.0f} s", flush=True)
    at = {d: np.linspace(0, len(w) - 2, args.pairs).astype(int).tolist() for d, w in texts.items()}
    found = {
        rule: {
            d: [next(iter(distances(patterns, heard[d][i], rule))) for i in at[d]] for d in texts
        }
        for rule in RULES
    }
    after = {d: [texts[d][i + 1] for i in at[d]] for d in texts}
    model = load(name, COMPUTE)
    whole = {d: losses(model, of) for d, of in after.items()}
    room = next(r for i in range(len(streamed.layers)) if (r := room_of(streamed, i)))
    rows = {
        recipe: {
            str(n): costs(model, streamed, tasks, found, after, n)
            for share in SHARES
            if (n := int(share * room.n)) >= room.top_k
        }
        for recipe, tasks in stores.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        patterns.save(Path(folder) / "patterns.safetensors")
        counts = [0, room.n, *(int(share * room.n) for share in SHARES[::-1])]
        held = memory(name, Path(folder) / "patterns.safetensors", counts)
    return {
        "model": Path(name).name,
        "device": device_name(model.device),
        "memory": held,
        "experts": room.n,
        "confusion": tables,
        "confusion_on_train": chosen_on,
        "whole": whole,
        "losses": rows,
        "seconds": round(time.perf_counter() - start),
    }


MEMORY = """
import ctypes, gc, json, sys, torch
from moecule.pattern import Patterns
from moecule.session import Compute, load
from moecule.taer import Wanted, retrieve

def held(key):
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    said = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(said[key].split()[0]) * 1024

torch.set_num_threads(1)
model, file, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
compute, ids = Compute(device="cpu", dtype="float32"), torch.arange(5, 261)[None]
before = held("VmRSS")
if n:
    net, _ = retrieve(model, ids, Wanted(Patterns.load(file), n), compute)
else:
    net = load(model, compute)
after, most = held("RssAnon"), held("VmHWM") - before
weights = sum(p.numel() * p.element_size() for p in net.parameters())
del net
print(json.dumps({"weights": weights, "held": after - held("RssAnon"), "peak": most}))
"""


def page(doc: dict[str, Any]) -> str:
    """README.md."""
    models = doc["models"]
    names = " ".join(m["model"] for m in models)
    lines = [
        HEAD.format(
            models=names,
            device=models[0]["device"],
            pooled=POOLED,
            said=SAID,
            **doc["settings"],
        )
    ]
    for m in models:
        lines += [
            f"## {m['model']}\n",
            *confusion_rows(m),
            "",
            *loss_rows(m),
            "",
            *memory_rows(m),
            "",
        ]
    return "\n".join(lines)


def confusion_rows(m: dict[str, Any]) -> list[str]:
    """How many prompts of each domain found which task, and how many were right."""
    lines = []
    for rule in RULES:
        table, before = m["confusion"][rule], m["confusion_on_train"][rule]
        spread = sum(p * (1 - p) / n for p, n in map(_share, table.items())) ** 0.5 / len(table)
        lines += [
            f"`{rule}`: {100 * right(table):.1f} ± {196 * spread:.1f} % right ({100 * right(before):.1f} % "
            "on train text). A row a domain, a column the task that was found.\n",
            f"| | {' | '.join(table)} | right |",
            "|---|" + "--:|" * (len(table) + 1),
        ]
        for at in table.items():
            cells = " | ".join(str(at[1][task]) for task in table)
            lines.append(f"| {at[0]} | {cells} | {100 * _share(at)[0]:.0f} % |")
        lines.append("")
    return lines[:-1]


def _share(at: tuple[str, dict[str, int]]) -> tuple[float, int]:
    """(share that found its own, prompts) of a domain."""
    domain, found = at
    return found[domain] / sum(found.values()), sum(found.values())


def loss_rows(m: dict[str, Any]) -> list[str]:
    """Added loss by which experts were loaded."""
    counts = list(m["losses"]["premoe"])
    head = [f"{recipe}, {n} of {m['experts']}" for recipe in m["losses"] for n in counts]
    lines = [f"| added nats a token | {' | '.join(head)} |", "|---|" + "--:|" * len(head)]
    wanted = ("own task", "found by spread", "found by tcess", POOLED)
    cells = [m["losses"][recipe][n] for recipe in m["losses"] for n in counts]
    for row in wanted:
        found = [difference(c[row], m["whole"]) for c in cells]
        lines.append(f"| {row} | {' | '.join(f'{d:.3f} ± {w:.3f}' for d, w in found)} |")
    for rule in RULES[::-1]:
        found = [difference(c[f"found by {rule}"], c[POOLED]) for c in cells]
        said = " | ".join(f"{d:+.3f} ± {w:.3f}" for d, w in found)
        lines.append(f"| {rule} less {POOLED} | {said} |")
    return lines


def difference(a: dict[str, list[float]], b: dict[str, list[float]]) -> tuple[float, float]:
    """(mean of the domains' mean differences, half width of its 95 % interval), pair by pair."""
    d = [np.asarray(a[domain]) - np.asarray(b[domain]) for domain in b]
    spread = np.sqrt(sum(x.var(ddof=1) / len(x) for x in d)) / len(d)
    return float(np.mean([x.mean() for x in d])), float(1.96 * spread)


def memory_rows(m: dict[str, Any]) -> list[str]:
    """Megabytes."""
    lines = ["| MB | weights | held, measured | at most while loading |", "|---|--:|--:|--:|"]
    for n, of in m["memory"].items():
        what = "`load`, all experts" if n == "0" else f"`retrieve`, {n} of {m['experts']}"
        cells = " | ".join(f"{of[key] / 1e6:.1f}" for key in ("weights", "held", "peak"))
        lines.append(f"| {what} | {cells} |")
    return lines


def memory(name: str, file: Path, counts: list[int]) -> dict[str, dict[str, int]]:
    """{experts a layer, 0: all, as load has them: bytes of weights, held once loaded, and at most}."""
    out = {}
    for n in counts:
        ran = subprocess.run(
            [sys.executable, "-c", MEMORY, name, str(file), str(n)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        out[str(n)] = json.loads(ran.stdout.splitlines()[-1])
    return out


def main() -> None:
    """Measure, or write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--text", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("-o", "--out", default=HERE / "results.json")
    parser.add_argument("--tables", type=Path)
    args = parser.parse_args()
    if args.tables:
        (HERE / "README.md").write_text(page(json.loads(args.tables.read_text())))
        return
    settings = {k: getattr(args, k) for k in ("samples", "windows", "pairs")}
    found = []
    for name in args.models:
        found.append(measure(name, args))
        Path(args.out).write_text(json.dumps({"settings": settings, "models": found}) + "\n")


if __name__ == "__main__":
    main()
