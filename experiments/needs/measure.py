"""Calibrating and applying, each in a fresh process: peak memory, disk and time beside the estimate.

python measure.py RECIPE SAMPLES LENGTH MODEL...      prints rows of the README's table
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

RUN = """
import json, resource, sys, time
import moecule
from moecule.recipe import load_recipe
def peak(who): return resource.getrusage(who).ru_maxrss * 1024
verb, model, out, recipe, samples, length = sys.argv[1:]
chosen = load_recipe(recipe, {"data.samples": int(samples), "data.length": int(length)})
import transformers.generation, transformers.quantizers, transformers.core_model_loading
before, start, at = peak(resource.RUSAGE_SELF), time.perf_counter(), time.process_time()
if verb == "calibrate":
    moecule.calibrate(model, out + "/stats", recipe=chosen)
else:
    plan = moecule.plan(out + "/stats", recipe=chosen)
    moecule.apply(model, plan, out, sampling=chosen.data)
took = time.perf_counter() - start
of = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
used = sum(r.ru_utime + r.ru_stime for r in of) - at
import torch
device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
own = peak(resource.RUSAGE_SELF)
print(json.dumps({"own": own, "imports": before, "took": took, "cpu": used, "device": device}))
"""


def on_disk(folder: Path) -> int:
    """Bytes of all files in `folder`, as far as they can be seen while others come and go."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(Path(place) / name).st_size
            except FileNotFoundError:  # gone since it was listed
                continue
    return total


def resident(pid: int) -> int:
    """Bytes in memory of all processes below this one."""
    total = 0
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
                total += pages * 4096 + resident(child)
    except (FileNotFoundError, ProcessLookupError):  # ended since it was listed
        return total
    return total


def measured(model: str, recipe: str, samples: str, length: str) -> dict[str, dict[str, float]]:
    """{verb: what was seen}: bytes, and the seconds it took.

    own: of the process at its peak; imports: before it began; host: with the process that opens the
    output afresh, seen every 20 ms.
    """
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for verb in ("calibrate", "apply"):
            most, done = [0, 0], threading.Event()

            def watch(most: list[int] = most, done: threading.Event = done) -> None:
                while not done.wait(0.02):
                    most[0] = max(most[0], on_disk(Path(folder)))
                    most[1] = max(most[1], resident(os.getpid()))

            watcher = threading.Thread(target=watch)
            watcher.start()
            command = [sys.executable, "-W", "ignore", "-c", RUN, verb, model, f"{folder}/out"]
            ended = subprocess.run(
                [*command, recipe, samples, length], capture_output=True, text=True
            )
            done.set()
            watcher.join()
            if ended.returncode:
                raise SystemExit(ended.stderr)
            seen = json.loads(ended.stdout.splitlines()[-1])
            found[verb] = {**seen, "disk": most[0], "host": max(most[1], seen["own"])}
    return found


def main(recipe: str, samples: str, length: str, *models: str) -> None:
    """Rows of a table, four a model: memory of host and device, disk, seconds."""
    for model in models:
        asked = ["--recipe", recipe, "--samples", samples, "--length", length, "--json"]
        said = subprocess.run(
            [sys.executable, "-m", "moecule", "inspect", model, *asked],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        guess, real = json.loads(said.stdout), measured(model, recipe, samples, length)
        print(json.dumps({"guess": guess["needs"] | guess["pace"], "real": real}), file=sys.stderr)
        needs, imports = guess["needs"], real["calibrate"]["imports"]
        rows = {
            "host, MB": (needs["host_bytes"] - imports, most(real, "host") - imports, 1e6),
            "disk, MB": (needs["disk_bytes"], most(real, "disk"), 1e6),
            "calibrate, s": (guess["pace"]["seconds"]["calibrate"], real["calibrate"]["took"], 1),
            "apply, s": (guess["pace"]["seconds"]["apply"], real["apply"]["took"], 1),
            "calibrate, CPU s": (
                guess["pace"]["seconds"]["calibrate"],
                real["calibrate"]["cpu"],
                1,
            ),
            "apply, CPU s": (guess["pace"]["seconds"]["apply"], real["apply"]["cpu"], 1),
        }
        if most(real, "device"):
            rows["device, MB"] = (needs["device_bytes"], most(real, "device"), 1e6)
        for what, (a, b, unit) in rows.items():
            name = f"{Path(model).name}, {recipe}, {samples} x {length}"
            print(
                f"| {name} | {what} | {a / unit:.0f} | {b / unit:.0f} | {a / b:.2f} |", flush=True
            )


def most(real: dict[str, dict[str, float]], what: str) -> float:
    """Over both verbs."""
    return max(found[what] for found in real.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
