"""The one loop: layer by layer over all batches, one decoder layer in memory at a time.

`walk` goes up through the layers; `walk_back` comes down again with the gradient of the loss,
recomputing each layer from the input that was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moecule.hf import Streamed, recorded

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Step:
    """One decoder layer, its weights loaded, before the batches pass."""

    index: int
    layer: nn.Module
    inputs: list[Float[Tensor, "B S H"]]
    calls: list[Call]  # how the model calls this layer, batch by batch
    outputs: list[Float[Tensor, "B S H"]] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> None:
        """Pass all batches. The last run before the walk goes on is what later layers receive."""
        self.outputs = [self.one(b) for b in range(len(self.inputs))]

    def one(self, b: int, hidden: Tensor | None = None) -> Tensor:
        """The layer's output for batch b, from other hidden states if given."""
        args, kwargs = self.calls[b]
        out = self.layer(self.inputs[b] if hidden is None else hidden, *args, **kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found


def walk(
    streamed: Streamed,
    batches: Sequence[Int[Tensor, "B S"]],
    tick: Callable[[], None] = lambda: None,
) -> Generator[Step, None, list[Float[Tensor, "B S H"]]]:
    """Yield each layer as a Step; return the final hidden states, before the last norm.

    What the caller does to a layer and then runs, all later layers feel. A step that the caller
    has not run is run here.
    """
    base = streamed.base
    with recorded(base) as recorders, torch.no_grad():
        hidden = [base(b.to(streamed.device), use_cache=False).last_hidden_state for b in batches]
        calls = [r.calls for r in recorders]
    for i in range(len(calls)):
        step = Step(i, streamed.load_layer(i), hidden, calls[i])
        yield step
        if not step.outputs:
            step.run()
        hidden = step.outputs
        step.layer.to("meta")
        tick()
    return hidden


@dataclass
class BackStep(Step):
    """One decoder layer on the way down: `grads` are of the loss by the layer's outputs."""

    grads: list[Float[Tensor, "B S H"]] = field(default_factory=list)

    def run_back(self, watched: list[Tensor]) -> list[Float[Tensor, "T H"]]:
        """Pass all batches up and down; return the loss's gradient by each tensor of `watched`.

        `watched` grows by one tensor a batch while the layer runs (a listener fills it). Afterwards
        `grads` are by the layer's inputs.
        """
        found = []
        for b, hidden in enumerate(self.inputs):
            with torch.enable_grad():
                x = hidden.detach().requires_grad_()
                out = self.one(b, x)
            by = [x, *watched[b:]]
            self.grads[b], *rest = torch.autograd.grad(out, by, self.grads[b])
            found += rest
            self.outputs.append(out.detach())
        return found


def walk_back(
    streamed: Streamed,
    steps: Sequence[Step],
    last: Sequence[Float[Tensor, "B S H"]],
    batches: Sequence[Int[Tensor, "B S"]],
    tick: Callable[[], None] = lambda: None,
) -> Generator[BackStep, None, None]:
    """Yield the layers from the last to the first, each with the gradient of the summed loss.

    `steps` are those of a walk over the same batches and `last` what it returned. The loss is the
    next-token cross entropy in nats, summed over tokens. The caller calls `run_back`.
    """
    grads = [loss_gradient(streamed, h, b) for h, b in zip(last, batches, strict=True)]
    for seen in reversed(steps):
        layer = streamed.load_layer(seen.index)
        step = BackStep(seen.index, layer, seen.inputs, seen.calls, grads=grads)
        yield step
        grads = step.grads
        layer.to("meta")
        tick()


def loss_gradient(
    streamed: Streamed, hidden: Float[Tensor, "B S H"], tokens: Int[Tensor, "B S"]
) -> Float[Tensor, "B S H"]:
    """Of the summed next-token loss, by the last layer's output."""
    with torch.enable_grad():
        x = hidden.detach().requires_grad_()
        logits = streamed.logits(x)[:, :-1]
        target = tokens[:, 1:].to(logits.device)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    return grad
