"""What does compressing cost on tasks? The originals against `mc` at 2.5 bits, asked the same items.

    moecule compress MODEL -o OUT/NAME --bits 2.5 --samples 32 --data TRAIN.jsonl.xz --text VAL/prose.txt
    moecule cloze VAL/*.txt -o CLOZE --items 200
    python experiments/tasks/measure.py MODEL OUT/NAME --tasks FOLDER --cloze CLOZE --text VAL/email.txt
        -o NAME.json
    python experiments/tasks/measure.py --tables NAME.json ...       this folder's README.md anew

FOLDER holds the benchmarks as task files. Each line of ASKED is one `moecule evaluate`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moecule

SEEN = ("prose", "techdoc", "python", "c", "maths", "multilingual")
OF_TEXT = (
    *(f"{domain}_cloze" for domain in SEEN),
    *("prose_next", "python_next", "maths_next", "prose_cloze:generate"),
)
BENCHMARKS = ("piqa", "arc_easy", "lambada", "winogrande", "copa", "svamp:generate")
# (of which folder, tasks, items of each)
ASKED = (("cloze", OF_TEXT, 100), ("tasks", BENCHMARKS, 100), ("tasks", ("blimp",), 8))
HEAD = Path(__file__).with_name("text.md")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The last result, with the tasks of all."""
    whole: dict[str, Any] = {}
    for i, (folder, names, limit) in enumerate(ASKED):
        _, after = moecule.evaluate(
            args.made,
            against=args.model,
            text=[args.text],
            suite=moecule.Suite(names, getattr(args, folder), limit),
            memory="original" if i == 0 else None,
            progress=lambda what, done, of: print(f"{what} {done}/{of}", end="\r", flush=True),
        )
        found = asdict(after)
        whole = whole or found
        for key in ("tasks", "original_tasks", "task_changes"):
            whole[key] = {**whole[key], **found[key]}
        for key in ("files", "groups", "cut"):
            whole["suite"][key] = {**whole["suite"][key], **found["suite"][key]}
        whole["suite"]["limit"] = None  # the table says how many
        args.out.write_text(json.dumps(whole, indent=1) + "\n")
        print(f"\n{names} done", flush=True)
    return whole


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a task and metric."""
    names = [Path(r["against"]).name for r in results]
    heads = " | ".join(f"{name}: 16 bits | 2.5 bits | change" for name in names)
    lines = [f"| task | metric | items | {heads} |", "|---|---|--:|" + "--:|--:|--:|" * len(names)]
    first = results[0]
    inside = {task for of in first["suite"]["groups"].values() for task in of}
    for task, row in first["tasks"].items():
        for metric in (m for m in row if m != "n" and not m.endswith("_stderr")):
            if task in inside:
                continue
            cells = [
                _cell(r[of][task], metric, sign)
                for r in results
                for of, sign in (("original_tasks", ""), ("tasks", ""), ("task_changes", "+"))
            ]
            lines.append(f"| {task} | {metric} | {row['n']} | {' | '.join(cells)} |")
    for r, name in zip(results, names, strict=True):
        a, b = r["original_throughput"], r["throughput"]
        lines += [
            "",
            f"Throughput of {name} in {b['memory_bytes'] / 1e6:.1f} MB (the original and one sequence of "
            f"{b['context_tokens']} tokens): {a['sequences']} sequence against {b['sequences']}, "
            f"{a['decode_tokens_per_s']:.1f} against {b['decode_tokens_per_s']:.1f} decoded tokens/s "
            f"together ({r['device']}, {r['dtype']}).",
        ]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, float], metric: str, sign: str) -> str:
    return f"{row[metric]:{sign}.3f} ± {row[f'{metric}_stderr']:.3f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("made", nargs="?")
    for name in ("--tasks", "--cloze", "--text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("-o", dest="out", type=Path)
    parser.add_argument("--tables", nargs="+", type=Path)
    args = parser.parse_args()
    if args.tables:
        made = table([json.loads(f.read_text()) for f in args.tables])
        HEAD.with_name("README.md").write_text(HEAD.read_text() + "\n" + made)
    else:
        measure(args)


if __name__ == "__main__":
    main()
