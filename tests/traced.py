"""Whether torch.compile takes a decoding step whole: `python tests/traced.py FAMILY FOLDER` prints JSON.

The GPU's kernels run interpreted on the CPU, in a process of its own: with shapes checked at run time, as
in tests, a step is more than the tracer can follow.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import tiny
import torch
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from transformers import StaticCache

from moecule import forward, gpu, online, runtime
from moecule.plan import Keep, Skip

STEPS = 2
operators: set[str] = set()  # of ours, in the graph


def noting(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
    """A compiler's backend that notes what it is given."""
    names = (str(node.target) for node in graph.graph.nodes)
    operators.update(n.split(".")[1] for n in names if n.startswith("moecule."))
    return lookup_backend("aot_eager")(graph, examples)


@torch.no_grad()
def decode(model: torch.nn.Module, *, compiled: bool) -> torch.Tensor:
    """Logits of every step after a prompt."""
    cache = StaticCache(config=model.config, max_cache_len=8)
    prompt = tiny.tokens(1, shape=(1, 2))[0]
    logits = [model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:]]
    step = torch.compile(model, backend=noting, fullgraph=True) if compiled else model
    for i in range(STEPS):
        token, position = logits[-1].argmax(-1), torch.tensor([[2 + i]])
        out = step(token, past_key_values=cache, position_ids=position, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits)


def main(name: str, folder: Path) -> None:
    """Compress, load, decode twice."""
    tiny.save(name, folder / "in", num_hidden_layers=1)
    streamed = tiny.stream(folder / "in")
    layers = tiny.moe_layers(streamed)
    limits = {i: (0.5,) * (streamed.moe(i).top_k - 1) for i in layers}
    made = tiny.plan(
        streamed,
        lambda i, e: Keep((2, 3)[e % 2], 32),
        rest={"attention": Keep(4, 32)},
        skip=Skip(limits, 0.1),
    )
    tiny.write(streamed, made, folder / "out", tiny.tokens(2))
    forward.GPU, forward._on_gpu = gpu, lambda x: True
    model = tiny.load(folder / "out")
    runtime.set_exact(model, False)
    online.set_skip(model, True)
    plain, ran = decode(model, compiled=False), online.experts_run(model)
    online.set_skip(model, True)
    both = decode(model, compiled=True)
    found = {
        "off_by": float((both - plain).abs().max() / plain.abs().max()),
        "graphs": counters["stats"]["unique_graphs"],
        "operators": sorted(operators),
        "run": [ran, online.experts_run(model)],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
