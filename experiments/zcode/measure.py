"""What aggregated experts, and experts merged or pruned, are worth as a start for training.

    python -m experiments.zcode.measure MODEL ... --data TRAIN.jsonl.xz --text VAL/*.txt -o rows.jsonl
        [--steps 300] [--seeds 0 1 2] [--only aoe|fewer] [--quick]
    python -m experiments.zcode.measure --tables rows.jsonl      the tables of README.md

TRAIN has lines [domain, text]. For each model and seed:

    aoe     two copies, each trained a little on half of the domains, are aggregated and trained on all;
            a model at random of the same size, and the model itself, for as many steps
    fewer   half of the experts: merged by UNCURL, routers first trained alone; dropped by Z-code, by use
            and by lot; and a model at random of that size; all for as many steps

The last state is measured, whatever it is. A run is a line; runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig

from bench.cases import FLOAT32, by_domain, windows_of, written
from moecule.aggregate import aggregate
from moecule.ask import Ask, decide
from moecule.calibrate import collect
from moecule.data import Sampling, sample_windows
from moecule.family import Family, load_family
from moecule.hf import auto_class, quiet
from moecule.inventory import take_inventory
from moecule.measure import device_name, window_losses
from moecule.moe import experts_in, find_layers, find_moe, listening
from moecule.recipe import load_recipe
from moecule.session import load, stream, tokenizer_of
from moecule.train.fit import Fitting, learning, renew_routers
from moecule.train.loop import train
from moecule.train.moved import changes, write_changed
from moecule.train.schedule import Schedule
from moecule.train.student import Student, mark, open_student

HERE = Path(__file__).parent
HALVES = (("multilingual", "prose", "techdoc"), ("c", "maths", "python"))
EVERY = HALVES[0] + HALVES[1]
ROUTERS = 0.25  # share of UNCURL's steps in which routers move alone
CALIBRATION = 64  # windows


@dataclass(frozen=True)
class Bench:
    """One model, one seed."""

    model: str
    seed: int
    args: argparse.Namespace
    folder: Path  # for checkpoints on the way

    def schedule(self, steps: int, lr: float) -> Schedule:
        """Of a run; its windows are drawn by the seed."""
        a = self.args
        return Schedule(steps=steps, batch=a.batch, micro=a.micro, lr=lr, every=steps, seed=self.seed,
                        precision=a.precision)  # fmt: skip

    def windows(self, domains: tuple[str, ...], n: int) -> Int[Tensor, "N S"]:
        """n of train text, as many of each domain; drawn once a model and seed."""
        file = self.folder / f"windows-{'-'.join(domains)}-{n}.pt"
        if not file.is_file():
            each = -(-n // len(domains))
            sampling = Sampling(samples=each, length=self.args.length, seed=self.seed)
            tokenizer, texts = tokenizer_of(Path(self.model)), texts_of(self.args.data)
            draws = [
                sample_windows(tokenizer, texts[d], sampling, sampling.length) for d in domains
            ]
            torch.save(torch.cat(draws), file)
        made: Tensor = torch.load(file)
        return made

    def teach(
        self,
        folder: Path,
        lr: float,
        *,
        steps: int | None = None,
        domains: tuple[str, ...] = EVERY,
        alone: int = 0,
        new_routers: bool = False,
    ) -> Student:
        """The model of `folder` after so many steps, in the first `alone` of which routers alone move."""
        steps = steps or self.args.steps
        windows = self.windows(domains, steps * self.args.batch)
        student = open_student(folder, FLOAT32)
        if new_routers:
            renew_routers(student, self.seed)
        with learning(student, Fitting()) as (loss, _):
            # routers that begin at random have a longer way
            rates = {"router": self.args.scratch_lr, "all": lr}
            for parts, n in (("router", alone), ("all", steps - alone)):
                mark(student, (parts,))
                if n:
                    train(student.model, loss, windows, self.schedule(n, rates[parts]))
        return student

    def source(self, half: int) -> Path:
        """A copy of the model that has learnt half of the domains a little more."""
        out, a = self.folder / f"source-{half}", self.args
        if not (out / "config.json").is_file():
            student = self.teach(Path(self.model), a.lr, steps=a.source_steps, domains=HALVES[half])
            write_changed(student.checkpoint, changes(student), out)
        return out

    def aggregated(self, picks: str, *, center: bool = False) -> Path:
        """Both in one; `picks`: "all" that both make together, or one's "own"."""
        out = self.folder / f"aggregated-{picks}-{center}"
        top_k = None if picks == "all" else load_top_k(self.model)
        if not (out / "config.json").is_file():
            aggregate([self.source(0), self.source(1)], out, top_k=top_k, center=center)
        return out

    def random(self, like: Path) -> Path:
        """A model at random of the same config."""
        out = self.folder / f"random-{like.name}"
        if not (out / "config.json").is_file():
            settings = AutoConfig.from_pretrained(like)
            torch.manual_seed(self.seed)
            with quiet():
                made = auto_class(type(settings)).from_config(settings, dtype=torch.float32)
                made.save_pretrained(out)
            for file in like.glob("tokenizer*"):
                shutil.copyfile(file, out / file.name)
        return out

    def cut(self, recipe: str) -> Path:
        """Half of the experts, by a recipe."""
        out = self.folder / recipe
        if not (out / "config.json").is_file():
            of = {"score.seed": self.seed} if recipe == "zcode_random" else {}
            chosen, counted = load_recipe(recipe, of), stream(self.model, FLOAT32)
            batches = list(self.windows(EVERY, CALIBRATION).split(8))
            stats = dict(collect(counted, batches, list(chosen.counted())))
            plan = decide(chosen, Ask(drop=0.5), stats, take_inventory(counted))
            opened = stream(self.model, FLOAT32)
            plan = replace(plan, model=self.model, digest=opened.checkpoint.digest)
            with written(opened, plan, batches) as made:
                shutil.copytree(made, out)
        return out


@cache
def texts_of(file: str) -> dict[str, list[str]]:
    """Train text by domain, read once."""
    return by_domain(file)


def load_top_k(model: str) -> int:
    """How many experts its routers pick."""
    moe = stream(model, FLOAT32, empty=True).moe(0)
    assert moe is not None
    return moe.top_k


def plain(folder: Path) -> Any:
    """As it is."""
    return load(folder, FLOAT32)


def aoe(b: Bench) -> dict[str, Callable[[], Any]]:
    """{run: what makes its model}"""
    a, made = b.args, dict[str, Callable[[], Any]]()
    made["as given"] = lambda: plain(Path(b.model))
    for half in (0, 1):
        made[f"source {half + 1}: {', '.join(HALVES[half])}"] = partial(
            lambda h: plain(b.source(h)), half
        )
    made["aggregated, own picks"] = lambda: plain(b.aggregated("own"))
    made["aggregated, own picks, centered"] = lambda: plain(b.aggregated("own", center=True))
    made["aggregated, all picks"] = lambda: plain(b.aggregated("all"))
    for picks in ("own", "all"):
        made[f"aggregated, {picks} picks, trained"] = partial(
            lambda p: b.teach(b.aggregated(p), a.lr).model, picks
        )
        made[f"at random, as large, {picks} picks, trained"] = partial(
            lambda p: b.teach(b.random(b.aggregated(p)), a.scratch_lr).model, picks
        )
    made["as given, trained"] = lambda: b.teach(Path(b.model), a.lr).model
    return made


def fewer(b: Bench) -> dict[str, Callable[[], Any]]:
    """{run: what makes its model}"""
    a, alone = b.args, round(ROUTERS * b.args.steps)
    made: dict[str, Callable[[], Any]] = {}
    for recipe in ("uncurl", "zcode", "zcode_random"):
        made[recipe] = partial(lambda r: plain(b.cut(r)), recipe)
        made[f"{recipe}, trained"] = partial(lambda r: b.teach(b.cut(r), a.lr).model, recipe)
    made["uncurl, routers first, trained"] = lambda: (
        b.teach(b.cut("uncurl"), a.lr, alone=alone).model
    )
    made["uncurl, new routers first, trained"] = lambda: (
        b.teach(b.cut("uncurl"), a.lr, alone=alone, new_routers=True).model
    )
    made["at random, half of the experts, trained"] = lambda: (
        b.teach(b.random(b.cut("zcode")), a.scratch_lr).model
    )
    return made


@torch.no_grad()
def shares(model: Any, windows: Int[Tensor, "N S"], family: Family, sources: int) -> list[float]:
    """Of the pairs of all MoE layers, how many go to the experts of each source."""
    total = torch.zeros(sources)
    for layer in find_layers(model)[1]:
        moe = find_moe(layer, family)
        assert moe is not None
        with listening(moe, torch.device("cpu"), outputs=False) as heard:
            model(input_ids=windows.to(model.device), use_cache=False)
        each = moe.experts.num_experts // sources
        total += (
            torch.cat(heard.idx)
            .flatten()
            .div(each, rounding_mode="floor")
            .bincount(minlength=sources)
        )
    return (total / total.sum()).tolist()


def measure(model: str, args: argparse.Namespace) -> None:
    """All runs of a model that the file lacks."""
    held = windows_of(model, args.text, args.length, args.windows)
    for seed in args.seeds:
        there = args.out.read_text().splitlines() if args.out.is_file() else []
        name = Path(model).name
        rows = map(json.loads, there)
        wanted = (args.steps, args.lr, args.scratch_lr)
        done = {
            (r["model"], r["seed"], r["run"])
            for r in rows
            if (r["steps"], r["lr"], r["scratch_lr"]) == wanted
        }
        how = (args.steps, args.source_steps, args.batch, args.length)
        folder = args.scratch / "-".join(map(str, (name, seed, *how)))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(model, seed, args, folder)
        kinds = {"aoe": aoe(bench), "fewer": fewer(bench)}
        for run, make in [
            r for k, of in kinds.items() if args.only in (None, k) for r in of.items()
        ]:
            if (name, seed, run) in done or run not in (args.runs or [run]):
                continue
            start = time.perf_counter()
            found = make()
            took = time.perf_counter() - start
            losses = {f: window_losses(found.eval(), w, 8).tolist() for f, w in held.items()}
            text = found.config.get_text_config()
            row = {"model": name, "seed": seed, "run": run, "steps": args.steps, "lr": args.lr,
                   "scratch_lr": args.scratch_lr, "experts": found_experts(found),
                   "top_k": text.num_experts_per_tok, "seconds": round(took, 1),
                   "device": device_name(found.device), "losses": losses}  # fmt: skip
            if run.startswith("aggregated"):
                first = torch.cat([w[:1] for w in held.values()])
                row["shares"] = shares(found, first, load_family(text.model_type), 2)
            with args.out.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{name} {seed} {run}: {mean_of(row):.4f} ({took:.0f} s)", flush=True)
            del found


def found_experts(model: Any) -> int:
    """Of a layer."""
    return int(experts_in(model)[0][1].num_experts)


def mean_of(row: dict[str, Any]) -> float:
    """The mean of the files' mean losses, nats a token."""
    return float(np.mean([np.mean(of) for of in row["losses"].values()]))


def table(rows: list[dict[str, Any]]) -> str:
    """A model's: mean over seeds and standard deviation, loss on held-out text."""
    lines = [f"## {rows[0]['model']}\n"]
    lines.append("| run | experts | picks | loss | tokens' experts of the first source |")
    lines.append("|---|--:|--:|--:|--:|")
    for name in dict.fromkeys(r["run"] for r in rows):
        of = [r for r in rows if r["run"] == name]
        losses = [mean_of(r) for r in of]
        wide = f" ± {np.std(losses, ddof=1):.4f}" if len(of) > 1 else ""
        share = f"{np.mean([r['shares'][0] for r in of]):.0%}" if "shares" in of[0] else ""
        lines.append(
            f"| {name} | {of[0]['experts']} | {of[0]['top_k']} | {np.mean(losses):.4f}{wide} | {share} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--data")
    parser.add_argument("--text", nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=Path("rows.jsonl"))
    parser.add_argument(
        "--scratch", type=Path, default=Path("scratch"), help="checkpoints on the way"
    )
    parser.add_argument("--only", choices=["aoe", "fewer"])
    parser.add_argument("--runs", nargs="+", help="by their names; without, all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--source-steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=0)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="of each held-out file")
    parser.add_argument("--lr", type=float, default=5e-4, help="of what was trained before")
    parser.add_argument(
        "--scratch-lr",
        type=float,
        default=2e-3,
        help="of what begins at random, and of routers alone",
    )
    parser.add_argument("--precision", default="bfloat16", help="of products: or float32")
    parser.add_argument(
        "--quick", action="store_true", help="a few small steps, to see that it runs"
    )
    parser.add_argument("--tables", type=Path)
    args = parser.parse_args()
    if args.tables:
        rows = [json.loads(line) for line in args.tables.read_text().splitlines()]
        for name in dict.fromkeys(r["model"] for r in rows):
            print(table([r for r in rows if r["model"] == name]))
        return
    if args.quick:
        args.seeds, args.steps, args.source_steps, args.batch = [0], 4, 2, 2
        args.length, args.windows, args.precision = 32, 1, "float32"
    if not (args.models and args.data and args.text):
        parser.error("give models, --data and --text")
    for model in args.models:
        measure(model, args)


if __name__ == "__main__":
    main()
