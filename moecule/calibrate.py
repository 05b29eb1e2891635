"""One pass over the model and the calibration text: the sums the methods asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moecule.batch import Batch
from moecule.errors import CheckpointError
from moecule.experts import Expert
from moecule.hf import Streamed
from moecule.journal import NO_TRAIL, Trail
from moecule.moe import Heard, Moe, experts_of, listening
from moecule.stats import LayerSeen, Seen, Statistic
from moecule.walk import Tick, Walked, walk, walk_back

Sums = dict[str, Tensor]  # by the statistic's name: [E, ...] of experts, [...] of the layer


def collect(
    streamed: Streamed,
    batches: Sequence[Batch],
    needs: Sequence[Statistic],
    tick: Tick = lambda: None,
    trail: Trail = NO_TRAIL,
) -> Iterator[tuple[int, Sums]]:
    """(MoE layer, its sums over the batches in float64), layer by layer as they are had.

    Where a statistic reads gradients, the layers are walked up and down again and everything is
    counted on the way down. Layers that the trail's journal has are not given again; a layer is
    noted when the next one is asked for. Raises CheckpointError where activations are not finite.
    """
    backward = any(s.backward for s in needs)
    up = walk(streamed, batches, tick, trail, keep=backward)
    while True:
        try:
            step = next(up)
        except StopIteration as end:
            walked: Walked = end.value
            break
        moe = streamed.moe(step.index)
        if moe is None or backward:
            continue
        count = LayerCount(step.index, needs)
        with listening(moe, trail.aside) as heard:
            for x, out in step.passes():
                count.add(x, out)
        yield step.index, _added_up(streamed, count.sums | expert_sums(streamed, moe, heard, needs))
    if not backward:
        return
    for back in walk_back(streamed, walked, batches, tick, trail):
        moe = streamed.moe(back.index)
        if moe is None:
            for _ in back.passes([]):
                pass
            continue
        count, grads = LayerCount(back.index, needs), []
        with listening(moe, trail.aside) as heard:
            for x, out, grad in back.passes(heard.live):
                assert grad is not None  # the experts were heard
                count.add(x, out)
                grads.append(heard.keep(grad))
        sums = expert_sums(streamed, moe, heard, needs, grads)
        yield back.index, _added_up(streamed, count.sums | sums)


def _added_up(streamed: Streamed, sums: Sums) -> Sums:
    """Over all processes."""
    return {name: streamed.ranks.add_up(t) for name, t in sorted(sums.items())}


@dataclass
class LayerCount:
    """The statistics of a whole layer, batch by batch."""

    index: int
    needs: Sequence[Statistic]
    sums: Sums = field(default_factory=dict)

    @torch.no_grad()
    def add(self, hidden: Float[Tensor, "B S *H"], out: Float[Tensor, "B S *H"]) -> None:
        """Raises CheckpointError where the layer's output is not finite."""
        if not torch.isfinite(out.sum(dtype=torch.float32)):
            raise CheckpointError(
                f"layer {self.index} gives NaN or Inf on this text; the checkpoint is damaged, "
                "or needs a wider dtype (--dtype float32)"
            )
        seen = LayerSeen(hidden.flatten(2).flatten(0, 1), out.flatten(2).flatten(0, 1))
        for s in self.needs:
            if s.of_layer is not None:
                more = s.of_layer(seen).double().cpu()
                self.sums[s.name] = self.sums[s.name] + more if s.name in self.sums else more


@torch.no_grad()
def expert_sums(
    streamed: Streamed,
    moe: Moe,
    heard: Heard,
    needs: Sequence[Statistic],
    grads: Sequence[Float[Tensor, "_T H"]] | None = None,
) -> Sums:
    """The statistics of a layer's experts, [E, ...] each; `grads` of the loss by the routed output."""
    wanted = [s for s in needs if s.of or s.of_expert]
    rows: list[Sums] = []
    for seens in seen_by(streamed, moe, heard, grads):
        row: Sums = {}
        functions: list[Callable[[Seen], Tensor]] = []
        for seen in seens:
            # what is made of the expert's weights is made once
            functions = functions or [s.of or _of(s, seen.expert) for s in wanted]
            for s, of in zip(wanted, functions, strict=True):
                more = of(seen).double()
                row[s.name] = row[s.name] + more if s.name in row else more
        rows.append({name: t.cpu() for name, t in row.items()})
    return {s.name: torch.stack([row[s.name] for row in rows]) for s in wanted}


def _of(statistic: Statistic, expert: Expert) -> Callable[[Seen], Tensor]:
    assert statistic.of_expert is not None  # one of the two is given
    return statistic.of_expert(expert)


@dataclass(frozen=True)
class _Routing:
    """One batch's, token by token."""

    prob: Float[Tensor, "T E"]
    ratio: Float[Tensor, "T K"]
    rank: Int[Tensor, "T K"]
    total: Float[Tensor, " T"]

    @staticmethod
    def of(logits: Float[Tensor, "T E"], coef: Float[Tensor, "T K"], scores: str) -> _Routing:
        order = coef.argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(coef.shape[1], device=coef.device).expand_as(order)
        return _Routing(
            prob=_probability(logits, scores),
            ratio=coef / coef.amax(-1, keepdim=True),
            rank=torch.empty_like(order).scatter_(-1, order, places),
            total=coef.sum(-1),
        )


def _probability(logits: Float[Tensor, "T E"], scores: str) -> Float[Tensor, "T E"]:
    """What a token thought of each expert before some were chosen; `scores` is of family.SCORES."""
    if scores == "softmax":
        return logits.softmax(-1)
    if scores == "sigmoid":
        return logits.sigmoid()
    return torch.nn.functional.softplus(logits).sqrt() if scores == "sqrtsoftplus" else logits


def seen_by(
    streamed: Streamed,
    moe: Moe,
    heard: Heard,
    grads: Sequence[Float[Tensor, "_T H"]] | None = None,
) -> Iterator[Iterator[Seen]]:
    """What each expert of the layer saw, expert by expert, each batch by batch.

    A batch that gave an expert nothing is passed over; one that no batch reached sees an empty one.
    """
    experts = experts_of(moe.experts)
    config = streamed.model.config.get_text_config()
    renormalised = streamed.family.is_renormalised(config)
    scores = streamed.family.scores_in(config)
    routing = [_Routing.of(g, c, scores) for g, c in zip(heard.logits, heard.coef, strict=True)]

    def seen(e: int, b: int, pairs: Int[Tensor, " t"]) -> Seen:
        expert, top_k = experts[e], heard.idx[b].shape[1]
        t, k, r = pairs // top_k, pairs % top_k, routing[b]
        x = heard.x[b][t].to(streamed.device)
        act = expert.act(x)
        there = x.device
        return Seen(
            x=x,
            coef=heard.coef[b][t, k].to(there),
            prob=r.prob[t, e].to(there),
            ratio=r.ratio[t, k].to(there),
            rank=r.rank[t, k].to(there),
            total=r.total[t].to(there),
            act=act,
            out=expert.out(act),
            routed=heard.routed[b][t].to(there),
            grad=None if grads is None else grads[b][t].to(there),
            top_k=top_k,
            renormalised=renormalised,
            expert=expert,
        )

    def of_expert(e: int, by_batch: Sequence[Tensor]) -> Iterator[Seen]:  # each of its own t
        filled = [b for b, pairs in enumerate(by_batch) if len(pairs)]
        return (seen(e, b, by_batch[b]) for b in filled or [0])

    for e, by_batch in enumerate(heard.pairs(len(experts))):
        yield of_expert(e, by_batch)
