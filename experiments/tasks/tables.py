"""This folder's README.md: text.md, and a table of results of `moecule evaluate --tasks`.

python experiments/tasks/tables.py RESULT.json ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from moecule.result import Result, load_result, shown, told

HERE = Path(__file__).parent


def table(results: list[Result]) -> str:
    """Markdown: a row a task and metric, three columns a model."""
    heads = " | ".join(f"{Path(str(r.against)).name}: 16 bits | 2.5 bits | change" for r in results)
    lines = [
        f"| task | metric | items | {heads} |",
        "|---|---|--:|" + "--:|--:|--:|" * len(results),
    ]
    for task, row, metric in told(results[0]):
        cells = [
            shown(of[task], metric, sign)
            for r in results
            for of, sign in ((original(r).tasks, ""), (r.tasks, ""), (r.task_changes, "+"))
        ]
        lines.append(f"| {task} | {metric} | {row['n']} | {' | '.join(cells)} |")
    return "\n".join([*lines, *map(throughput, results)]) + "\n"


def original(result: Result) -> Result:
    """What was measured beside it."""
    assert result.original is not None
    return result.original


def throughput(result: Result) -> str:
    """A sentence."""
    a, b = original(result).throughput, result.throughput
    assert a is not None and b is not None
    return (
        f"\nIn {b.memory_bytes / 1e6:.1f} MB, what {Path(str(result.against)).name} takes with one "
        f"sequence of {b.context_tokens} tokens, it decodes {a.sequences} sequence at "
        f"{a.decode_tokens_per_s:.1f} tokens/s, and the compressed model {b.sequences} at "
        f"{b.decode_tokens_per_s:.1f} together ({result.device}, {result.dtype}, shared with others)."
    )


if __name__ == "__main__":
    found = [load_result(Path(f)) for f in sys.argv[1:]]
    (HERE / "README.md").write_text((HERE / "text.md").read_text() + "\n" + table(found))
