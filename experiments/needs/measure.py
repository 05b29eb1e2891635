"""Calibrating and applying, each in a fresh process: peak memory, disk and time beside the estimate.

python measure.py RECIPE SAMPLES LENGTH MODEL...      prints a row of the README's tables a model
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RUN = """
import json, resource, sys, time
import moecule
from moecule.recipe import load_recipe
def peak(who): return resource.getrusage(who).ru_maxrss * 1024
verb, model, out, recipe, samples, length = sys.argv[1:]
chosen = load_recipe(recipe, {"data.samples": int(samples), "data.length": int(length)})
import transformers.generation, transformers.quantizers, transformers.core_model_loading
before, start = peak(resource.RUSAGE_SELF), time.perf_counter()
if verb == "calibrate":
    moecule.calibrate(model, out + "/stats", recipe=chosen)
else:
    plan = moecule.plan(out + "/stats", recipe=chosen)
    moecule.apply(model, plan, out, sampling=chosen.data)
took = time.perf_counter() - start
print(json.dumps([peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN), before, took]))
"""


def on_disk(folder: Path) -> int:
    """Bytes of all files in `folder`, as far as they can be seen while others come and go."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # gone since it was listed
            continue
    return total


def measured(model: str, recipe: str, samples: str, length: str) -> dict[str, list[float]]:
    """{verb: [own peak, child's peak, after imports, seconds, disk]}, in bytes but for the seconds."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for verb in ("calibrate", "apply"):
            most, done = [0], threading.Event()

            def watch(most: list[int] = most, done: threading.Event = done) -> None:
                while not done.wait(0.02):
                    most[0] = max(most[0], on_disk(Path(folder)))

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
            found[verb] = [*json.loads(ended.stdout.splitlines()[-1]), most[0]]
    return found


def main(recipe: str, samples: str, length: str, *models: str) -> None:
    """A row a model."""
    for model in models:
        asked = ["--recipe", recipe, "--samples", samples, "--length", length, "--json"]
        said = subprocess.run(
            [sys.executable, "-m", "moecule", "inspect", model, *asked],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        guess, real = json.loads(said.stdout), measured(model, recipe, samples, length)
        print(json.dumps({"model": Path(model).name, "estimate": guess, "measured": real}))


if __name__ == "__main__":
    main(*sys.argv[1:])
