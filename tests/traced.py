"""Whether torch.compile takes a decoding step whole: `python tests/traced.py FAMILY FOLDER` prints JSON.

With `offloaded`: while experts come into a cache and go. With `many`: by the kernels for more tokens. With
`masks`: by learnt masks instead of thresholds.

The GPU's kernels run interpreted on the CPU, in a process of its own: with shapes checked at run time, as
in tests, a step is more than the tracer can follow.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import tiny
import torch
from test_otp import HOW, lively_heads
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from transformers import StaticCache

from moecule import forward, gpu, online, runtime
from moecule.kernels import gemv
from moecule.learnt import put_heads
from moecule.offload import offload
from moecule.plan import Keep, Masks, Skip

STEPS = 2
operators: set[str] = set()  # of ours, in the graph


def noting(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
    """A compiler's backend that notes what it is given."""
    names = (str(node.target) for node in graph.graph.nodes)
    operators.update(n.split(".")[1] for n in names if n.startswith("moecule."))
    return lookup_backend("aot_eager")(graph, examples)


@torch.no_grad()
def decode(
    model: torch.nn.Module, *, compiled: bool, between: Callable[[], object] = int
) -> torch.Tensor:
    """Logits of every step after a prompt. between: called before each."""
    cache = StaticCache(config=model.config, max_cache_len=8)
    prompt = tiny.tokens(1, shape=(1, 2))[0]
    logits = [model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:]]
    step = torch.compile(model, backend=noting, fullgraph=True) if compiled else model
    for i in range(STEPS):
        between()
        token, position = logits[-1].argmax(-1), torch.tensor([[2 + i]])
        out = step(token, past_key_values=cache, position_ids=position, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits)


def written(name: str, folder: Path, *, masks: bool = False) -> Any:
    """A compressed model with online skipping, as it is loaded."""
    tiny.save(name, folder / "in", num_hidden_layers=1)
    streamed = tiny.stream(folder / "in")
    layers = tiny.moe_layers(streamed)
    limits = {i: (0.5,) * (streamed.moe(i).top_k - 1) for i in layers}
    made = tiny.plan(
        streamed,
        lambda i, e: Keep((2, 3)[e % 2], 32),
        rest={"attention": Keep(4, 32)},
        skip=Masks(HOW) if masks else Skip(limits, 0.1),
    )
    tiny.write(streamed, made, folder / "out", tiny.tokens(2))
    if masks:
        put_heads(folder / "out", lively_heads(folder / "out"))
    forward.GPU, forward._on_gpu = gpu, lambda *x: True
    gemv.tiling = lambda of, pairs: gemv.Tiling(rows=32)  # as the fixture `coarse`
    return tiny.load(folder / "out")


def whole(model: Any) -> dict[str, Any]:
    """Decode twice, with skipping."""
    runtime.set_exact(model, False)
    online.set_skip(model, True)
    plain, ran = decode(model, compiled=False), online.experts_run(model)
    online.set_skip(model, True)
    both = decode(model, compiled=True)
    return {
        "off_by": off_by(both, plain),
        "operators": sorted(operators),
        "run": [ran, online.experts_run(model)],
    }


def moving(model: Any) -> dict[str, Any]:
    """Decode with all in the cache, then with little room and others in it at every step."""
    runtime.set_exact(model, False)
    made = offload(model, torch.device("cpu"), 10**9)
    plain, pairs = decode(model, compiled=False), made.held() and made.pairs
    made = offload(model, torch.device("cpu"), len(made.arena) // 3)
    moved = 0

    def look() -> None:
        nonlocal moved
        before = set(made.at)
        made.heat[:] = 9
        made.heat[list(before)] = 0
        made.refresh()
        made.arena[: min(made.at.values())] = 0xA5
        moved += len(set(made.at) - before)

    both = decode(model, compiled=True, between=look)
    made.held()
    return {"off_by": off_by(both, plain), "moved": moved, "pairs": [pairs, made.pairs]}


def many(model: Any) -> dict[str, Any]:
    """Decode twice by grouped products, rounded and as they are."""
    gpu.FEW_PAIRS, errors = 0, []
    torch.nn.Module.half(model)
    for exact in (False, True):
        runtime.set_exact(model, exact)
        torch._dynamo.reset()
        plain = decode(model, compiled=False)
        errors.append(off_by(decode(model, compiled=True), plain))
    return {"off_by": max(errors), "operators": sorted(operators)}


def off_by(have: torch.Tensor, want: torch.Tensor) -> float:
    """Of the largest."""
    return float((have - want).abs().max() / want.abs().max())


def main(name: str, folder: Path, *how: str) -> None:
    """Compress, load, decode twice."""
    model = written(name, folder, masks="masks" in how)
    modes = {"offloaded": moving, "many": many, "masks": whole}
    found = modes[how[0]](model) if how else whole(model)
    print(json.dumps(found | {"graphs": counters["stats"]["unique_graphs"]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
