"""One pass over the model and the calibration text: the sums the methods asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moecule.errors import CheckpointError
from moecule.hf import Heard, Moe, Streamed, experts_of, listening
from moecule.stats import LayerSeen, Seen, Statistic
from moecule.walk import Step, walk, walk_back

Sums = dict[int, dict[str, Tensor]]


def collect(
    streamed: Streamed,
    batches: Sequence[Int[Tensor, "B S"]],
    needs: Sequence[Statistic],
    tick: Callable[[], None] = lambda: None,
) -> Sums:
    """{MoE layer: {statistic: [E, ...]}} over the batches, in float64.

    Where a statistic reads gradients, the layers are walked up and down again and everything is
    counted on the way down. Raises CheckpointError where activations are not finite.
    """
    sums: Sums = {}
    if not any(s.backward for s in needs):
        for step in walk(streamed, batches, tick):
            moe = streamed.moe(step.index)
            if moe is not None:
                with listening(moe) as heard:
                    step.run()
                sums[step.index] = layer_sums(streamed, step, moe, heard, None, needs)
        return sums
    steps: list[Step] = []
    up = walk(streamed, batches, tick)
    while True:
        try:
            steps.append(next(up))
        except StopIteration as end:
            last = end.value
            break
    for back in walk_back(streamed, steps, last, batches, tick):
        moe = streamed.moe(back.index)
        if moe is None:
            back.run_back([])
            continue
        with listening(moe) as heard:
            grads = back.run_back(heard.routed)
        sums[back.index] = layer_sums(streamed, back, moe, heard, torch.cat(grads), needs)
    return dict(sorted(sums.items()))


def layer_sums(
    streamed: Streamed,
    step: Step,
    moe: Moe,
    heard: Heard,
    grad: Float[Tensor, "T H"] | None,
    needs: Sequence[Statistic],
) -> dict[str, Tensor]:
    """Every statistic of one layer."""
    with torch.no_grad():
        layer = LayerSeen(
            torch.cat([h.flatten(0, 1) for h in step.inputs]),
            torch.cat([h.flatten(0, 1) for h in step.outputs]),
        )
        if not torch.isfinite(layer.out).all():
            raise CheckpointError(
                f"layer {step.index} gives NaN or Inf on this text; the checkpoint is damaged, "
                "or needs a wider dtype (--dtype float32)"
            )
        found = {s.name: s.of_layer(layer).double().cpu() for s in needs if s.of_layer}
        lists: dict[str, list[Tensor]] = {s.name: [] for s in needs if s.of}
        for seen in seen_by(streamed, moe, heard, grad):
            for s in needs:
                if s.of:
                    lists[s.name].append(s.of(seen).double().cpu())
        return found | {name: torch.stack(values) for name, values in lists.items()}


def seen_by(
    streamed: Streamed, moe: Moe, heard: Heard, grad: Float[Tensor, "T H"] | None
) -> Iterator[Seen]:
    """What each expert of the layer saw, expert by expert, over all batches at once."""
    x, idx, coef = torch.cat(heard.x), torch.cat(heard.idx), torch.cat(heard.coef)
    routed, logits = torch.cat(heard.routed).detach(), torch.cat(heard.logits)
    batch = torch.cat([torch.full((len(t),), b) for b, t in enumerate(heard.x)]).to(x.device)
    prob = logits.sigmoid() if streamed.family.scores == "sigmoid" else logits.softmax(-1)
    order = coef.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(idx.shape[1], device=x.device).expand_as(order)
    )
    ratio, total = coef / coef.amax(-1, keepdim=True), coef.sum(-1)
    experts = experts_of(moe.experts)
    renormalised = streamed.family.is_renormalised(streamed.model.config.to_dict())
    for e in range(len(experts)):
        t, k = torch.where(idx == e)
        act = experts[e].act(x[t].detach())
        yield Seen(
            x=x[t].detach(),
            coef=coef[t, k].detach(),
            prob=prob[t, e].detach(),
            ratio=ratio[t, k].detach(),
            rank=rank[t, k],
            total=total[t].detach(),
            batch=batch[t],
            act=act,
            out=experts[e].out(act),
            routed=routed[t],
            grad=None if grad is None else grad[t],
            top_k=idx.shape[1],
            renormalised=renormalised,
            expert=experts[e],
        )
