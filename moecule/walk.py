"""The one loop: layer by layer over all batches, one decoder layer in memory at a time.

`walk` goes up through the layers; `walk_back` comes down again with the gradient of the loss,
recomputing each layer from the input that was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecule.batch import IGNORED, Batch, labels_of, rows_of
from moecule.hf import Streamed
from moecule.journal import NO_TRAIL, Trail
from moecule.record import Call, record
from moecule.states import States, give_back

Tick = Callable[[], None]
Calls = list[list[Call]]  # how the model calls its layers, batch by batch


@dataclass
class Step:
    """One decoder layer, its weights loaded, before the batches pass."""

    index: int
    layer: nn.Module
    inputs: States
    calls: Calls
    outputs: States
    note: dict[str, Any] = field(default_factory=dict)  # for the journal

    def passes(self) -> Iterator[tuple[Float[Tensor, "B S *H"], Float[Tensor, "B S *H"]]]:
        """Pass batch after batch, giving (input, output); later layers receive what comes out."""
        for b in range(len(self.inputs)):
            x, handed = self.inputs.both(b)
            with torch.no_grad():
                out, handed = self.calls[b][self.index](self.layer, x, handed)
            self.outputs.append(out, handed)
            yield x, out

    def run(self) -> None:
        """Pass all batches."""
        for _ in self.passes():
            pass

    @torch.no_grad()
    def listen(self) -> None:
        """Pass all batches for those who listen; what comes out is forgotten."""
        for b in range(len(self.inputs)):
            self.calls[b][self.index](self.layer, *self.inputs.both(b))


@dataclass(frozen=True)
class Walked:
    """What a walk leaves: enough to come down again."""

    last: States  # the last layer's output
    calls: Calls
    inputs: dict[int, States]  # of the layers, where they were kept


def walk(
    streamed: Streamed,
    batches: Sequence[Batch],
    tick: Tick = lambda: None,
    trail: Trail = NO_TRAIL,
    *,
    keep: bool = False,
) -> Generator[Step, None, Walked]:
    """Yield each layer as a Step; return what is left, the final hidden states among it.

    What the caller does to a layer and then runs, all later layers feel. A step that the caller
    has not run is run here. Layers that the trail's journal has are not yielded again. `keep`: the
    inputs of all layers stay, for `walk_back`.
    """
    n, device = len(streamed.layers), streamed.device
    start, down = trail.done("up"), trail.done("down")
    embedded, calls = trail.states("up_0000", device), Calls()
    for batch in batches:
        hidden, called = record(
            streamed.model, batch, calls[0] if calls else None, streamed.family.takes
        )
        calls.append(called)
        if start == 0:
            embedded.append(hidden)
    # of an earlier run: what is still to be gone through again
    there = [*(range(min(start, n - down)) if keep else ()), *([start] if down == 0 else [])]
    found = {i: trail.reopen(f"up_{i:04d}", len(batches), device) for i in there if start > 0}
    now = found.pop(start, embedded)
    for _ in range(start):
        tick()
    for i in range(start, n):
        layer = streamed.load_layer(i, then=i + 1 if i + 1 < n else None)
        step = Step(i, layer, now, calls, trail.states(f"up_{i + 1:04d}", device))
        yield step
        if not len(step.outputs):
            step.run()
        now.settle()  # a walk that keeps its inputs goes on from these too
        step.outputs.settle()
        trail.note({"up": i, **step.note})
        layer.to("meta")
        if keep:
            found[i] = now
        else:
            now.drop()
        now = step.outputs
        give_back()
        tick()
    return Walked(now, calls, found)


def finish(
    up: Generator[Step, None, Walked], each: Callable[[Step], None] = lambda step: None
) -> Walked:
    """Go the rest of the way, `each` layer being handed over before the walk goes on."""
    while True:
        try:
            each(next(up))
        except StopIteration as end:
            walked: Walked = end.value
            return walked


@dataclass
class BackStep:
    """One decoder layer on the way down: `above` is the loss's gradient by the layer's outputs."""

    index: int
    layer: nn.Module
    inputs: States
    calls: Calls
    above: States
    below: States  # by its inputs

    def passes(
        self, watched: list[Tensor]
    ) -> Iterator[
        tuple[Float[Tensor, "B S *H"], Float[Tensor, "B S *H"], Float[Tensor, "T H"] | None]
    ]:
        """Pass batch after batch up and down: (input, output, gradient by what is in `watched`).

        A listener puts a tensor into `watched` while the layer runs, or none; here it is emptied.
        """
        for b in range(len(self.inputs)):
            with torch.enable_grad():
                given, handed = self.inputs.both(b)
                x = given.detach().requires_grad_()
                out, _ = self.calls[b][self.index](self.layer, x, handed)
            grads = torch.autograd.grad(out, [x, *watched], self.above[b])
            watched.clear()
            self.below.append(grads[0])
            yield x.detach(), out.detach(), grads[1] if len(grads) > 1 else None


def walk_back(
    streamed: Streamed,
    walked: Walked,
    batches: Sequence[Batch],
    tick: Tick = lambda: None,
    trail: Trail = NO_TRAIL,
) -> Generator[BackStep, None, None]:
    """Yield the layers from the last to the first, each with the gradient of the summed loss.

    `walked` is what a walk over the same batches returned, inputs kept. The loss is the next-token
    cross entropy in nats, summed over tokens. The caller exhausts `passes`.
    """
    n, device, done = len(streamed.layers), streamed.device, trail.done("down")
    top = f"down_{n - done:04d}"
    if done == 0:
        above = trail.states(top, device)
        for hidden, batch in zip(walked.last, batches, strict=True):
            above.append(loss_gradient(streamed, hidden, batch))
    else:
        above = trail.reopen(top, len(batches), device)
    for _ in range(done):
        tick()
    for i in reversed(range(n - done)):
        layer = streamed.load_layer(i, then=i - 1 if i else None)
        below = trail.states(f"down_{i:04d}", device)
        inputs = walked.inputs[i]
        yield BackStep(i, layer, inputs, walked.calls, above, below)
        below.settle()
        trail.note({"down": i})
        layer.to("meta")
        inputs.drop()
        above.drop()
        above = below
        give_back()
        tick()


def loss_gradient(
    streamed: Streamed, hidden: Float[Tensor, "B S *H"], batch: Batch
) -> Float[Tensor, "B S *H"]:
    """Of the summed next-token loss, by the last layer's output."""
    rows = rows_of(batch)  # the logits of a whole batch may not fit: row by row
    parts = zip(hidden.split(len(hidden) // len(rows)), rows, strict=True)
    return torch.cat([_gradient(streamed, h, row) for h, row in parts])


def _gradient(streamed: Streamed, hidden: Tensor, batch: Batch) -> Tensor:
    with torch.enable_grad():
        x = hidden.detach().requires_grad_()
        logits = streamed.logits(x, batch)[:, :-1]
        target = labels_of(batch)[:, 1:].to(logits.device)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=IGNORED
        )
    (grad,) = torch.autograd.grad(loss, x)
    return grad
