"""One pass over the model and the calibration text: the sums the methods asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from moecule.batch import Batch
from moecule.errors import CheckpointError
from moecule.experts import Expert
from moecule.hf import Streamed
from moecule.journal import NO_TRAIL, Trail
from moecule.moe import Heard, Moe, experts_of, listening, probability
from moecule.stats import LayerSeen, Routed, Seen, Statistic
from moecule.subset import Calls, block_of, recalling
from moecule.walk import Tick, Walked, walk, walk_back

Sums = dict[str, Tensor]  # by the statistic's name: [E, ...] of experts, [...] of the layer


def countable(
    streamed: Streamed, statistics: Sequence[Statistic], needed: Sequence[Statistic] = ()
) -> tuple[Statistic, ...]:
    """Those of the statistics that the model has; the needed ones whether it has them or not.

    Where experts live in another width than the residual stream, how far they turn it is not seen.
    """
    moes = [moe for i in range(len(streamed.layers)) if (moe := streamed.moe(i))]
    width = streamed.model.config.get_text_config().hidden_size
    inside = all(experts_of(m.experts).down.shape[1] == width for m in moes)
    return tuple(s for s in statistics if inside or not s.turned or s in needed)


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
    backward, turned = (any(getattr(s, of) for s in needs) for of in ("backward", "turned"))
    whole = any(s.of_block for s in needs)
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
        with listening(moe, trail.aside, turned=turned) as heard, recalling(moe, whole) as calls:
            for x, out in step.passes():
                count.add(x, out)
        sums = count.sums | expert_sums(streamed, moe, heard, needs)
        added = _added_up(streamed, sums, needs)
        yield step.index, added | block_sums(streamed, moe, heard, calls, needs, added)
    if not backward:
        return
    for back in walk_back(streamed, walked, batches, tick, trail):
        moe = streamed.moe(back.index)
        if moe is None:
            for _ in back.passes([]):
                pass
            continue
        count, grads = LayerCount(back.index, needs), []
        with listening(moe, trail.aside, turned=turned) as heard, recalling(moe, whole) as calls:
            for x, out, grad in back.passes(heard.live):
                assert grad is not None  # the experts were heard
                count.add(x, out)
                grads.append(heard.keep(grad))
        sums = expert_sums(streamed, moe, heard, needs, grads)
        added = _added_up(streamed, count.sums | sums, needs)
        yield back.index, added | block_sums(streamed, moe, heard, calls, needs, added)


def _added_up(streamed: Streamed, sums: Sums, needs: Sequence[Statistic]) -> Sums:
    """Over all processes."""
    greatest = {s.name for s in needs if s.greatest}
    ranks = streamed.ranks
    return {n: ranks.add_up(t, greatest=n in greatest) for n, t in sorted(sums.items())}


def _put(sums: Sums, statistic: Statistic, more: Tensor) -> None:
    """What a batch adds, to what those before it did."""
    name = statistic.name
    sums[name] = statistic.join(sums[name], more) if name in sums else more


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
                _put(self.sums, s, s.of_layer(seen).double().cpu())


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
                _put(row, s, of(seen).double())
        rows.append(row)
    # once a statistic: a GPU must not stand still after every expert
    sums = {s.name: torch.stack([row[s.name] for row in rows]).cpu() for s in wanted}
    return sums | router_sums(streamed, moe, heard, needs)


def router_sums(streamed: Streamed, moe: Moe, heard: Heard, needs: Sequence[Statistic]) -> Sums:
    """The statistics of a layer's router, and of its experts, over all its tokens: [E, ...] each."""
    sums: Sums = {}
    experts, there = experts_of(moe.experts), streamed.device
    wanted = {s: s.of_experts(experts) if s.of_experts else None for s in needs}
    wanted = {s: of for s, of in wanted.items() if of or s.of_router}
    scores = streamed.family.scores_in(streamed.model.config.get_text_config())
    n = len(experts)
    for x, logits, idx, coef in (
        zip(heard.x, heard.logits, heard.idx, heard.coef, strict=True) if wanted else ()
    ):
        prob = probability(logits, scores)
        # some routers score experts that always run in their last columns
        seen = Routed(logits[:, :n], prob[:, :n], idx, coef)
        for s, of in wanted.items():
            if of is not None:
                more = of(x.to(there), seen)
            else:
                assert s.of_router is not None
                more = s.of_router(seen)
            _put(sums, s, more.double().cpu())
    return sums


@torch.no_grad()
def block_sums(
    streamed: Streamed,
    moe: Moe,
    heard: Heard,
    calls: Calls,
    needs: Sequence[Statistic],
    sums: Sums,
) -> Sums:
    """What is made of the layer as a whole; `sums` are all others, `calls` what `recalling` noted."""
    wanted = [s for s in needs if s.of_block is not None]
    if not wanted:
        return {}
    block, found = block_of(streamed, moe, heard, calls, sums), Sums()
    for s in wanted:
        assert s.of_block is not None
        found[s.name] = s.of_block(block).double().cpu()
    return found


def _of(statistic: Statistic, expert: Expert) -> Callable[[Seen], Tensor]:
    assert statistic.of_expert is not None  # one of the two is given
    return statistic.of_expert(expert)


@dataclass(frozen=True)
class _Routing:
    """One batch's, pair by pair, in runs of an expert each; on the device where experts run."""

    token: Sequence[Tensor]  # each of its own t, as in Seen
    coef: Sequence[Tensor]
    prob: Sequence[Tensor]
    ratio: Sequence[Tensor]
    rank: Sequence[Tensor]
    total: Sequence[Tensor]

    @staticmethod
    def of(
        heard: Heard, b: int, pairs: Sequence[Tensor], scores: str, there: torch.device
    ) -> _Routing:
        """Of batch b; `pairs` are its (token, rank) pairs, numbered, expert by expert."""
        coef, counts, at = heard.coef[b], [*map(len, pairs)], torch.cat(list(pairs))
        token, expert = at // coef.shape[1], heard.idx[b].flatten()[at]
        order = coef.argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(coef.shape[1], device=coef.device).expand_as(order)

        def runs(by_pair: Shaped[Tensor, " pairs"]) -> Sequence[Tensor]:
            split: Sequence[Tensor] = by_pair.to(there).split(counts)
            return split

        return _Routing(
            token=token.split(counts),  # where what was heard lies
            coef=runs(coef.flatten()[at]),
            prob=runs(probability(heard.logits[b], scores)[token, expert]),
            ratio=runs((coef / coef.amax(-1, keepdim=True)).flatten()[at]),
            rank=runs(torch.empty_like(order).scatter_(-1, order, places).flatten()[at]),
            total=runs(coef.sum(-1)[token]),
        )


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
    there, by_expert = streamed.device, heard.pairs(len(experts))
    routing = [
        _Routing.of(heard, b, pairs, scores, there)
        for b, pairs in enumerate(zip(*by_expert, strict=True))
    ]

    def seen(e: int, b: int) -> Seen:
        expert, r = experts[e], routing[b]
        t = r.token[e]
        x = heard.x[b][t].to(there)
        act = expert.act(x)
        return Seen(
            x=x,
            coef=r.coef[e],
            prob=r.prob[e],
            ratio=r.ratio[e],
            rank=r.rank[e],
            total=r.total[e],
            act=act,
            out=expert.out(act),
            routed=heard.routed[b][t].to(there),
            grad=None if grads is None else grads[b][t].to(there),
            turn=heard.turn[b][t].to(there) if heard.turn else None,
            top_k=heard.idx[b].shape[1],
            renormalised=renormalised,
            expert=expert,
        )

    def of_expert(e: int, by_batch: Sequence[Tensor]) -> Iterator[Seen]:  # each of its own t
        filled = [b for b, pairs in enumerate(by_batch) if len(pairs)]
        return (seen(e, b) for b in filled or [0])

    for e, by_batch in enumerate(by_expert):
        yield of_expert(e, by_batch)
