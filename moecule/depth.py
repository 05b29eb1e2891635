"""How the loss grows from layer to layer, and which layers skip: measured on a sample of the text.

A sample passes through the first layers of the compressed model and on through the original's, for
every number of first layers at once: when a layer of the original is in memory, all samples that
left the compressed model before it pass. So the last entry is the compressed model, and what each
adds to the one before is its layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moecule.batch import Batch, n_predicted, n_tokens, rows_of
from moecule.hf import Streamed
from moecule.measure import batch_sums
from moecule.online import experts_run_by_layer
from moecule.states import States
from moecule.walk import Calls, Step, Tick, Walked, finish, walk

SAMPLE_TOKENS = 4096  # at most
BESIDE = 2  # of the sample's states, besides one for every layer: on their way in, and out


@dataclass(frozen=True)
class Depth:
    """Layers up to this one compressed, all after it the original's; means over the sample's tokens."""

    layer: int
    loss_nats: float
    kl_nats: float  # of the original's distribution against this one's
    # |a - b|^2 over |b|^2 of the hidden states after it, of the compressed model and of the original
    error: float


@dataclass(frozen=True)
class Skipped:
    """What online skipping does on the sample: shares of (token, expert) pairs that run, and the loss."""

    experts_run: Mapping[int, float]  # by layer
    loss_nats: float
    kl_nats: float  # of the original's distribution against this one's


@dataclass(frozen=True)
class Sampled:
    """What was measured on the sample, by layer."""

    tokens: int  # with a loss
    loss_nats: float  # of the original
    depths: tuple[Depth, ...]
    skipped: Skipped | None = None  # where the checkpoint has a rule


def sample_of(given: Mapping[str, Sequence[Batch]], layers: int) -> list[Batch]:
    """Sequences of all files in turn, as many as cost no more than all the text in one walk.

    At least one of the first file; of SAMPLE_TOKENS tokens at most, if that is one sequence or more.
    """
    rows = [[row for batch in of for row in rows_of(batch)] for of in given.values()]
    total = sum(n_tokens(of) for of in rows)
    most = min(SAMPLE_TOKENS, 2 * total // layers)
    found: list[Batch] = []
    for at in range(max(map(len, rows))):
        for of in rows:
            if at < len(of) and (not found or n_tokens([*found, of[at]]) <= most):
                found.append(of[at])
    return found


def by_depth(
    streamed: Streamed,
    original: Streamed,
    sample: Sequence[Batch],
    tick: Tick = lambda: None,
    skipping: Streamed | None = None,
) -> Sampled:
    """The loss by layers compressed; `skipping`: the model with its online skipping switched on.

    `tick` is called once a layer of every model.
    """
    left: list[States] = []
    finish(walk(streamed, sample, tick), lambda step: left.append(_run(step)))
    skipped = None if skipping is None else finish(walk(skipping, sample, tick))
    mixed: list[States] = []
    errors: list[float] = []

    def go_on(step: Step) -> None:
        step.run()
        for k in range(len(mixed)):  # one by one: what a sample was is let go of
            mixed[k] = _through(step, mixed[k])
        mixed.append(left.pop(0))
        errors.append(_error(mixed[-1], step.outputs))

    walked = finish(walk(original, sample, tick), go_on)
    sums = [_sums(original, states, walked, sample) for states in mixed]
    n = n_predicted(sample)
    depths = tuple(
        Depth(i, loss / n, kl / n, error)
        for i, ((loss, _, kl), error) in enumerate(zip(sums, errors, strict=True))
    )
    skip = None
    if skipped is not None and skipping is not None:
        loss, _, kl = _sums(original, skipped.last, walked, sample)
        skip = Skipped(experts_run_by_layer(skipping.model), loss / n, kl / n)
    return Sampled(n, sums[0][1] / n, depths, skip)


def _run(step: Step) -> States:
    """All batches through the layer; what came out, which the walk may let go of."""
    step.run()
    return _kept(step.outputs.device, step.outputs.both, len(step.outputs))


@torch.no_grad()
def _through(step: Step, states: States) -> States:
    calls: Calls = step.calls
    return _kept(
        states.device,
        lambda b: calls[b][step.index](step.layer, *states.both(b)),
        len(states),
    )


def _kept(
    device: torch.device,
    of: Callable[[int], tuple[torch.Tensor, torch.Tensor | None]],  # as States.both
    n: int,
) -> States:
    kept = States(device, "host")
    for b in range(n):
        kept.append(*of(b))
    return kept


def _error(found: States, wanted: States) -> float:
    miss = size = 0.0
    for a, b in zip(found, wanted, strict=True):
        miss += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    return miss / max(size, 1e-300)


def _sums(
    original: Streamed, states: States, walked: Walked, sample: Sequence[Batch]
) -> tuple[float, float, float]:
    """(loss, the original's, KL), summed over tokens; heads and final norms are the original's."""
    total = torch.zeros(4, dtype=torch.float64)
    for b, batch in enumerate(sample):
        total += batch_sums(original, states[b], batch, (original, walked.last[b])).sum(0)
    loss, theirs, kl, _ = total.tolist()
    return loss, theirs, kl
