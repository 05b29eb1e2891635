"""Which GPU holds which experts: hot ones more than once, packed so that GPUs have alike much to do.

The idea is EPLB's (DeepSeek-V3, arXiv:2412.19437, section 3.4): a copy more for whoever has most to do a
copy, then the heaviest copy to the GPU that has least. Here no GPU holds an expert twice, and experts
are swapped for as long as that relieves the GPU that has most. Copies of an expert share its tokens evenly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from moecule.errors import RecipeError

Load = Sequence[float]  # of each expert: how often it was used
SUFFIX: Mapping[str, str] = {
    "sglang": "sglang.json",
    "tensorrt-llm": "tensorrt-llm.yaml",
    "vllm-ascend": "vllm-ascend.json",
}


@dataclass(frozen=True)
class Placement:
    """A layer's experts in the slots of the GPUs."""

    gpus: int
    experts: tuple[int, ...]  # slot after slot, GPU after GPU: engines say physical to logical

    @property
    def by_gpu(self) -> list[tuple[int, ...]]:
        """The experts of each GPU."""
        slots = len(self.experts) // self.gpus
        return [self.experts[g * slots : (g + 1) * slots] for g in range(self.gpus)]

    def balance(self, load: Load) -> float:
        """What the GPU that has most has to do, over the mean of all: 1 is even, `gpus` the worst."""
        copies = [self.experts.count(e) for e in range(len(load))]
        each = [sum(load[e] / copies[e] for e in held) for held in self.by_gpu]
        return max(each) * self.gpus / sum(each) if sum(each) > 0 else 1.0


def in_order(n: int, gpus: int) -> Placement:
    """As engines place n experts by themselves; slots that are left take the first ones again.

    >>> in_order(5, 2).by_gpu
    [(0, 1, 2), (3, 4, 0)]
    """
    return Placement(gpus, tuple(i % n for i in range(gpus * -(-n // gpus))))


def place(load: Load, gpus: int, replicas: int) -> Placement:
    """`replicas`: slots of every GPU beyond those that one copy of each expert takes.

    Raises RecipeError for numbers that cannot be.

    >>> place([6, 2, 2, 2], gpus=2, replicas=1).by_gpu
    [(0, 2, 1), (0, 3, 1)]
    """
    n = len(load)
    if gpus < 1 or replicas < 0:
        raise RecipeError(
            f"{gpus} GPUs and {replicas} replicas a GPU were asked for; wanted 1 GPU or more (--gpus) "
            "and 0 replicas or more (--replicas)"
        )
    slots = -(-n // gpus) + replicas
    if slots > n:
        raise RecipeError(
            f"{replicas} replicas make {slots} slots a GPU, and a layer has {n} experts; give "
            f"--replicas {n - (slots - replicas)} or fewer"
        )
    copies = _copies(load, gpus, gpus * slots)
    held = _packed([x / c for x, c in zip(load, copies, strict=True)], copies, gpus, slots)
    return Placement(gpus, tuple(e for of in held for e in of))


def _copies(load: Load, gpus: int, slots: int) -> list[int]:
    """Of each expert, one a GPU at most."""
    copies = [1] * len(load)
    for _ in range(slots - len(load)):
        able = [e for e, c in enumerate(copies) if c < gpus]
        copies[max(able, key=lambda e: (load[e] / copies[e], -e))] += 1
    return copies


def _packed(each: Sequence[float], copies: Sequence[int], gpus: int, slots: int) -> list[list[int]]:
    """The experts of each GPU; `each` is the load of one copy."""
    held: list[list[int]] = [[] for _ in range(gpus)]

    def has(g: int) -> float:
        return sum(each[e] for e in held[g])

    for e in sorted(range(len(each)), key=lambda e: (-each[e], e)):
        for _ in range(copies[e]):
            free = [g for g in range(gpus) if len(held[g]) < slots]
            able = [g for g in free if e not in held[g]]
            if able:
                held[min(able, key=lambda g: (has(g), g))].append(e)
                continue
            # who has room has the expert already: a full GPU takes it, and gives up another
            to, ways = free[0], list[tuple[float, int, int]]()
            for g in range(gpus):
                if e not in held[g]:
                    gone = [x for x in held[g] if x not in held[to]]
                    ways += [
                        (max(has(to) + each[x], has(g) - each[x] + each[e]), g, x) for x in gone
                    ]
            _, g, x = min(ways)
            held[g][held[g].index(x)] = e
            held[to].append(x)
    while _swapped(each, held):
        pass
    return held


def _swapped(each: Sequence[float], held: list[list[int]]) -> bool:
    """Whether two experts were found whose swap relieves the GPU that has most; the best two are."""
    has = [sum(each[e] for e in of) for of in held]
    top = max(range(len(held)), key=lambda g: (has[g], -g))
    best = (has[top] * (1 - 1e-9), -1, -1, -1)
    for g, of in enumerate(held):
        for x in held[top]:
            if g == top or x in of:
                continue
            for y in of:
                less = each[x] - each[y]
                if less > 0 and y not in held[top]:
                    best = min(best, (max(has[top] - less, has[g] + less), g, x, y))
    _, g, x, y = best
    if g < 0:
        return False
    held[top][held[top].index(x)], held[g][held[g].index(y)] = y, x
    return True


def for_engine(engine: str, placed: Mapping[int, Placement], n_layers: int) -> str:
    """The text of the file that an engine takes; `placed` by MoE layer, of `n_layers` decoder layers.

    sglang: `--init-expert-location FILE`, with `--ep-num-redundant-experts` as many as there are slots
    beyond the experts; every decoder layer has a row, dense ones too. tensorrt-llm: `moe_config:
    load_balancer: FILE`. vllm-ascend: `eplb_config: expert_map_path`, layers numbered among MoE layers.
    Raises RecipeError where layers have not as many experts each, which none of them takes.
    """
    first = next(iter(placed.values()))
    if len({(max(p.experts), len(p.experts)) for p in placed.values()}) > 1:
        raise RecipeError(
            f"layers have different numbers of experts, and {engine} wants as many in each; "
            "read the placement in expert_load.json, and leave --engine out"
        )
    if engine == "sglang":
        dense = in_order(max(first.experts) + 1, 1).experts
        dense = tuple(dense[i % len(dense)] for i in range(len(first.experts)))
        rows = [list(placed[i].experts if i in placed else dense) for i in range(n_layers)]
        return json.dumps({"physical_to_logical_map": rows}) + "\n"
    if engine == "tensorrt-llm":
        config = {
            "num_slots": len(first.experts),
            "initial_global_assignments": {i: list(p.experts) for i, p in placed.items()},
            "layer_updates_per_iter": 0,  # the placement stays
        }
        return str(yaml.safe_dump(config, default_flow_style=None, width=10**9, sort_keys=False))
    layers = [
        {
            "layer_id": at,
            "device_count": p.gpus,
            "device_list": [
                {"device_id": g, "device_expert": list(of)} for g, of in enumerate(p.by_gpu)
            ],
        }
        for at, p in enumerate(placed.values())
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n"
