"""Z-code M3's multitask training in small: translation between ciphers, and mending, on a CPU.

    python -m experiments.zcode.toy -o experiments/zcode/toy.jsonl [--steps 800] [--seeds 3]
    python -m experiments.zcode.toy --quick -o FILE
    python -m experiments.zcode.toy --tables experiments/zcode/toy.jsonl     the tables of README.md

The model is Qwen3-MoE as transformers has it, two layers of experts of which one is picked, with the
router's own probability as its coefficient (as the paper's gate; the paper's model is an encoder and a
decoder, this one a decoder alone). A run is a line; a file that is there already is added to.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.cases import FLOAT32, written
from experiments.zcode.ciphers import VOCABULARY, WINDOW, World, answer_loss, exact, examples
from moecule.aggregate import aggregate
from moecule.ask import Ask, decide
from moecule.calibrate import collect
from moecule.family import load_family
from moecule.hf import choose_experts, quiet
from moecule.inventory import take_inventory
from moecule.moe import find_layers, find_moe
from moecule.plan import Plan
from moecule.recipe import load_recipe
from moecule.session import stream
from moecule.train.capacity import Select, balancing, limiting
from moecule.train.loop import train
from moecule.train.schedule import Schedule

HERE = Path(__file__).parent
HALVES = ((0, 1), (2, 3))  # languages that each of two sources is trained to say
BALANCE = 0.01
ASKED = 100  # sentences of each direction
FIELDS = ("run", "experts", "steps", "loss", "translate", "mend", "left_out")


@dataclass(frozen=True)
class Setting:
    """Sizes of everything, and the seed of a model and its text."""

    steps: int = 800
    batch: int = 64
    width: int = 64
    seed: int = 0

    def fresh(self, experts: int) -> Any:
        """A model at random."""
        torch.manual_seed(self.seed)
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=VOCABULARY,
                hidden_size=self.width,
                moe_intermediate_size=self.width,
                intermediate_size=self.width,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=self.width // 4,
                num_experts=experts,
                num_experts_per_tok=1,
                norm_topk_prob=False,
                max_position_embeddings=WINDOW,
                initializer_range=0.05,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def text(self, world: World, steps: int, part: int, **only: Any) -> Int[Tensor, "N S"]:
        """Enough for so many steps; `part` numbers what shall not be the same."""
        return examples(world, steps * self.batch, 1000 * self.seed + part, **only)


def teach(
    model: Any,
    text: Int[Tensor, "N S"],
    steps: int,
    setting: Setting,
    capacity: float | None = 1.0,
    select: Select = "random",
    *,
    by_language: bool = False,
) -> float:
    """Train all of it; the share of (token, expert) pairs that found no room.

    `by_language`: a step's sentences come in the order of the languages they are wanted in.
    """
    family = load_family("qwen3_moe")
    moes = [moe for layer in find_layers(model)[1] if (moe := find_moe(layer, family))]
    schedule = Schedule(steps=steps, batch=setting.batch, lr=3e-3, every=steps, seed=setting.seed)
    choose_experts(model)
    with ExitStack() as stack:
        told = stack.enter_context(balancing(moes, model.config.num_experts, "softmax"))
        rules = []
        if capacity is not None:
            rules = stack.enter_context(limiting(moes, model.config.num_experts, capacity, select))

        def loss(model: Any, ids: Int[Tensor, "B S"]) -> Float[Tensor, ""]:
            ids = ids[ids[:, 0].argsort(stable=True)] if by_language else ids
            said = model(input_ids=ids, use_cache=False).logits
            return answer_loss(said, ids) + BALANCE * told.take()

        train(model.requires_grad_(True), loss, text, schedule)
    return sum(rule.share_left_out for rule in rules) / max(1, len(rules))


def reloaded(folder: Path) -> Any:
    """A checkpoint of this run."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def saved(model: Any, folder: Path) -> Path:
    """Where it now lies."""
    with quiet():
        model.save_pretrained(folder)
    return folder


def cut(folder: Path, text: Int[Tensor, "N S"], recipe: str, seed: int) -> Any:
    """Half of the experts of every layer gone, by a recipe of Z-code."""
    changes = {"score.seed": seed} if recipe == "zcode_random" else {}
    batches, chosen = list(text.split(64)), load_recipe(recipe, changes)
    counted = stream(folder, FLOAT32)
    stats = dict(collect(counted, batches, list(chosen.counted())))
    plan = decide(chosen, Ask(drop=0.5), stats, take_inventory(counted))
    opened = stream(folder, FLOAT32)
    plan = replace(plan, model="toy", digest=opened.checkpoint.digest)
    assert isinstance(plan, Plan)
    with written(opened, plan, batches[:1]) as made:
        return reloaded(made)


def runs(setting: Setting, told: Callable[..., None]) -> None:
    """All of one seed; `told` is given a name, the model, the steps it was trained for, pairs left out."""
    world, steps = World.of(setting.seed), setting.steps
    text = setting.text(world, steps, 1)
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        for select in ("random", "position", "probs", None):
            model = setting.fresh(8)
            capacity = None if select is None else 1.0
            out = teach(model, text, steps, setting, capacity, select or "random")
            told(
                f"from scratch, capacity 1, {select}" if select else "from scratch, no limit",
                model,
                steps,
                out,
            )
            if select == "random":
                saved(model, at / "eight")
        _aggregated(setting, world, text, at, told)
        model = setting.fresh(8)
        out = teach(model, setting.text(world, 2 * steps, 2), 2 * steps, setting)
        told("from scratch, as many steps as AoE and its sources", model, 2 * steps, out)
        more, quarter = setting.text(world, steps // 4, 3), steps // 4
        for recipe, how in (("zcode", "by use"), ("zcode_random", "by lot")):
            model = cut(at / "eight", text[:1024], recipe, setting.seed)
            told(f"8 to 4 {how}", model, steps, 0.0)
            out = teach(model, more, quarter, setting)
            told(f"8 to 4 {how}, then trained", model, steps + quarter, out)
        model = setting.fresh(4)
        told(
            "4 from scratch, as long as 8 to 4 was trained",
            model,
            quarter,
            teach(model, more, quarter, setting),
        )


def ordered(setting: Setting, told: Callable[..., None]) -> None:
    """Who is left out where a step's sentences do not come by lot."""
    text = setting.text(World.of(setting.seed), setting.steps, 1)
    for select in ("random", "position"):
        model = setting.fresh(8)
        out = teach(model, text, setting.steps, setting, 1.0, select, by_language=True)
        told(f"language after language, {select}", model, setting.steps, out)


def _aggregated(
    setting: Setting, world: World, text: Int[Tensor, "N S"], at: Path, told: Callable[..., None]
) -> None:
    """Two of four experts, each taught half of the languages, become one of eight."""
    steps, half = setting.steps, setting.steps // 2
    for i, into in enumerate(HALVES):
        model = replace(setting, seed=setting.seed + 100 * (i + 1)).fresh(4)
        out = teach(model, setting.text(world, half, 10 + i, into=into), half, setting)
        told(f"source {i + 1} of AoE", model, half, out)
        saved(model, at / f"source-{i}")
    made = aggregate([at / "source-0", at / "source-1"], at / "aggregated", top_k=1, center=True)
    told("AoE 4 + 4, before it is trained", reloaded(made.folder), steps, 0.0)
    model = reloaded(made.folder)
    told("AoE 4 + 4", model, 2 * steps, teach(model, text, steps, setting))


def measured(model: Any, world: World, held: Int[Tensor, "N S"]) -> dict[str, Any]:
    """Loss, and the share of sentences without a mistake, by direction and in the mean."""
    model.eval()
    with torch.no_grad():
        loss = float(answer_loss(model(input_ids=held, use_cache=False).logits, held))
    by = exact(model, world, ASKED, 77)
    kinds = {"translate": [v for n, v in by.items() if ">" in n],
             "mend": [v for n, v in by.items() if ">" not in n]}  # fmt: skip
    return {"loss": loss, **{k: sum(of) / len(of) for k, of in kinds.items()}, "by": by}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds, and how far it is from the least to the greatest."""
    lines = [
        "| run | experts | steps | loss | translated | mended | left out |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(row["run"] for row in rows):
        of = [row for row in rows if row["run"] == name]

        def cell(key: str, form: str, of: list[dict[str, Any]] = of) -> str:
            values = [row[key] for row in of]
            return (
                f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"
            )

        cells = [name, str(of[0]["experts"]), str(of[0]["steps"]), cell("loss", ".3f")]
        cells += [cell("translate", ".0%"), cell("mend", ".0%")]
        cells.append(f"{sum(row['left_out'] for row in of) / len(of):.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_direction(rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """The share of sentences without a mistake by direction, mean over seeds."""
    of = {name: [row["by"] for row in rows if row["run"] == name] for name in names}
    lines = [f"| direction | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for direction in of[names[0]][0]:
        cells = [f"{sum(by[direction] for by in of[n]) / len(of[n]):.0%}" for n in names]
        lines.append(f"| {direction} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure(setting: Setting, out: Path, what: Callable[..., None]) -> None:
    """These runs of a seed, a line each when all are done."""
    world, lines, began = World.of(setting.seed), list[str](), time.perf_counter()
    held = examples(world, 512, 1000 * setting.seed + 999)

    def told(run: str, model: Any, steps: int, left_out: float) -> None:
        nonlocal began
        found = measured(model, world, held)
        row = {
            "run": run,
            "seed": setting.seed,
            "experts": model.config.num_experts,
            "steps": steps,
        }
        row |= {"left_out": left_out, **found, "seconds": round(time.perf_counter() - began, 1)}
        lines.append(json.dumps(row))
        print(
            " ".join(f"{row[k]:.3f}" if isinstance(row[k], float) else str(row[k]) for k in FIELDS)
        )
        began = time.perf_counter()

    what(setting, told)
    with out.open("a") as f:
        f.write("\n".join(lines) + "\n")


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="a few small steps, to see that it runs"
    )
    parser.add_argument("--tables", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.tables:
        rows = [json.loads(line) for line in args.tables.read_text().splitlines()]
        print(table(rows))
        print(by_direction(rows, DIRECTIONS))
        return
    there = args.out.read_text().splitlines() if args.out.is_file() else []
    done = {(row["seed"], row["run"]) for row in map(json.loads, there)}
    for seed in range(1 if args.quick else args.seeds):
        sizes = {"steps": 24, "batch": 16, "width": 32} if args.quick else {"steps": args.steps}
        for first, what in FIRST.items():
            if (seed, first) not in done:
                measure(Setting(seed=seed, **sizes), args.out, what)


FIRST = {"from scratch, capacity 1, random": runs, "language after language, random": ordered}
DIRECTIONS = (
    "from scratch, capacity 1, random", "from scratch, capacity 1, position", "AoE 4 + 4",
    "8 to 4 by use, then trained", "8 to 4 by lot, then trained", "language after language, random",
    "language after language, position",
)  # fmt: skip


if __name__ == "__main__":
    main()
