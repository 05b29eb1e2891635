"""ODP: skip an expert online where the token's first expert outweighs it, but not for key tokens.

Huang et al., "Mixture Compressor for Mixture-of-Experts LLMs Gains More", 2024,
arXiv:2410.06270; the ratio rule is that of Lu et al. 2024, arXiv:2402.14800.

    run the expert of rank r > 0  unless  w_r / w_0 < mu_layer  and the token is not protected
    protected: the 2 % of a prompt's tokens with the largest  |t|_1 * attention received

mu is the median of the ratio over the calibration text. Kept coefficients are scaled back to the
sum they had, where the family renormalises.

Differences from the paper:
- Attention received sums over the queries that come after a token, divided by their number; the
  authors' code sums over keys, which is always 1. It is computed block by block, so no T x T
  matrix is held and the model may use any attention implementation.
- The paper's models are top-2; with more experts a token mu is the median over all of the tail,
  so that a layer gives up half of its tail, the lightest half.
- The layers to prune are those of least measured damage, as many as it takes to leave out `rate`
  of the pairs (20 of 32 for Mixtral-8x7B); theirs come from a hard-coded list.
- rule = "damage" picks one threshold a layer so that `rate` of the pairs go at least total
  damage; damage is the change of the layer's output from leaving out one pair, squared, over the
  hidden states' squared norm ("hidden"), or through the gradient of the loss ("fisher").
- While decoding (one token at a time) the ratio rule works alone, as in their code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from moecule.errors import RecipeError
from moecule.method import Method
from moecule.stats import BINS, HIDDEN_SQ, Seen, Statistic, Stats, histograms


@dataclass(frozen=True)
class Options:
    """Defaults are the paper's."""

    rule: Literal["median", "damage"] = "median"
    rate: float = 0.15  # share of all (token, expert) pairs to leave out, at least
    protect: float = 0.02
    damage: Literal["hidden", "fisher"] = "hidden"

    def __post_init__(self) -> None:
        """Raises RecipeError for shares that are none."""
        for name, value in (("rate", self.rate), ("protect", self.protect)):
            if not 0 <= value < 1:
                raise RecipeError(f"odp: {name} = {value:g}, wanted a share from 0 to below 1")


def change(seen: Seen) -> Float[Tensor, "t H"]:
    """What leaving out this expert alone changes in the layer's output, token by token."""
    own = seen.coef[:, None] * seen.out
    if not seen.renormalised:
        return -own
    rest = (seen.total - seen.coef)[:, None]
    # a coefficient of all the mass is never left out: it has rank 0
    return torch.where(rest > 0, (seen.routed - own) * seen.total[:, None] / rest, 0) - seen.routed


def _by_rank(seen: Seen) -> Float64[Tensor, "K bins"]:
    return histograms(seen.ratio, seen.rank, seen.top_k)


def _damage(seen: Seen) -> Float64[Tensor, "K bins"]:
    return _spread(seen, change(seen).double().square().sum(-1))


def _fisher(seen: Seen) -> Float64[Tensor, "K bins"]:
    assert seen.grad is not None  # the statistic says backward
    return _spread(seen, (change(seen).double() * seen.grad.double()).sum(-1).square())


def _spread(seen: Seen, loss: Float64[Tensor, " t"]) -> Float64[Tensor, "K bins"]:
    return histograms(seen.ratio, seen.rank, seen.top_k, loss)


RATIO = Statistic("skip_ratio", _by_rank)
DAMAGE = {
    "hidden": Statistic("skip_damage", _damage),
    "fisher": Statistic("skip_fisher", _fisher, backward=True),
}


def needs(options: Options) -> tuple[Statistic, ...]:
    """Histograms of ratios, and of the damage by ratio."""
    return (RATIO, DAMAGE[options.damage], HIDDEN_SQ)


def thresholds(stats: Stats, options: Options) -> tuple[dict[int, tuple[float, ...]], float]:
    """({layer: threshold by rank, rank 1 first}, share of tokens protected).

    Raises RecipeError where the rate cannot be had without leaving out a token's first expert.
    """
    pairs = {i: s["skip_ratio"].sum(0) for i, s in stats.items()}  # [K, bins]
    harm = {i: s[DAMAGE[options.damage].name].sum(0) for i, s in stats.items()}
    if options.damage == "hidden":
        harm = {i: h / stats[i]["hidden_sq"] for i, h in harm.items()}
    if options.rule == "median":
        return _medians(pairs, harm, options), options.protect
    return _least_damage(pairs, harm, options), options.protect


def _medians(
    pairs: Mapping[int, Tensor], harm: Mapping[int, Tensor], options: Options
) -> dict[int, tuple[float, ...]]:
    """Layers of least damage, cut at their median, until the rate is reached."""
    cut = {i: int((_below(p)[1:] <= p[1:].sum() / 2).sum()) for i, p in pairs.items()}
    loss = {i: float(_below(harm[i])[b]) for i, b in cut.items()}
    wanted = _wanted(pairs, options)
    chosen: list[int] = []
    for i in sorted(loss, key=lambda i: (loss[i], i)):
        if sum(float(_below(pairs[c])[cut[c]]) for c in chosen) >= wanted:
            break
        chosen.append(i)
    return {i: (cut[i] / BINS,) * (len(pairs[i]) - 1) for i in sorted(chosen)}


def _wanted(pairs: Mapping[int, Tensor], options: Options) -> float:
    """Pairs to leave out among tokens that are not protected. Raises RecipeError for too many."""
    wanted = options.rate / (1 - options.protect) * sum(float(p.sum()) for p in pairs.values())
    most = sum(float(p[1:].sum()) for p in pairs.values())
    if wanted > most:
        raise RecipeError(
            f"a rate of {options.rate:g} leaves out first experts too; the most is "
            f"{most / wanted * options.rate:.3f}"
        )
    return wanted


def _least_damage(
    pairs: Mapping[int, Tensor], harm: Mapping[int, Tensor], options: Options
) -> dict[int, tuple[float, ...]]:
    """One threshold a layer: bins are bought by damage a pair until the rate is reached."""
    wanted = _wanted(pairs, options)
    n = {i: _below(p) for i, p in pairs.items()}
    d = {i: _below(h) for i, h in harm.items()}
    low, high = 0.0, 1.0 + max(float(t[-1]) for t in d.values())
    for _ in range(200):  # the price of a pair at which layers together give up `wanted`
        price = (low + high) / 2
        cut = {i: int((d[i] - price * n[i]).argmin()) for i in n}
        enough = sum(float(n[i][b]) for i, b in cut.items()) >= wanted
        low, high = (low, price) if enough else (price, high)
    cut = {i: int((d[i] - high * n[i]).argmin()) for i in n}
    ranks = {i: len(p) - 1 for i, p in pairs.items()}
    return {i: (b / BINS,) * ranks[i] for i, b in sorted(cut.items()) if b > 0}


def _below(by_rank: Float64[Tensor, "K bins"]) -> Float64[Tensor, " bins_and_1"]:
    """Sums over ranks 1 and on of all bins below each threshold."""
    running = by_rank[1:].sum(0).cumsum(0)
    return torch.cat([running.new_zeros(1), running])


def kept(
    coef: Float[Tensor, "T K"],
    thresholds: tuple[float, ...],
    protected: Bool[Tensor, " T"] | None,
) -> Bool[Tensor, "T K"]:
    """Which pairs run. All run at thresholds 0; a token's first expert always runs."""
    ordered, order = coef.sort(dim=-1, descending=True, stable=True)
    limit = coef.new_tensor((0.0, *thresholds)) * ordered[:, :1]
    run = ordered >= limit
    if protected is not None:
        run |= protected[:, None]
    return torch.empty_like(run).scatter_(-1, order, run)


def rescaled(
    coef: Float[Tensor, "T K"], run: Bool[Tensor, "T K"], renormalised: bool
) -> Float[Tensor, "T K"]:
    """Coefficients of the kept pairs: 0 where skipped, back to the old sum where renormalised."""
    left = coef * run
    if renormalised:
        left = left * (coef.sum(-1, keepdim=True) / left.sum(-1, keepdim=True))
    return torch.where(run.all(-1, keepdim=True), coef, left)


def attention_received(
    query: Float[Tensor, "B heads Q D"],
    key: Float[Tensor, "B kv_heads S D"],
    mask: Tensor | None,
    scaling: float,
    sinks: Float[Tensor, " heads"] | None = None,
    block: int = 128,
) -> tuple[Float[Tensor, "B Q"], Bool[Tensor, "B Q"]]:
    """(mean attention that each query's token gets from itself and later ones, is it no padding).

    `mask` [B or 1, 1, Q, S or more]: bool (True attends) or additive; None is causal, the last
    query on the last key. Queries are taken `block` at a time: memory is heads x block x S, never
    heads x Q x S.
    """
    b, heads, q_len, _ = query.shape
    s_len = key.shape[2]
    key = key.float().repeat_interleave(heads // key.shape[1], 1)
    received = key.new_zeros(b, s_len)
    own, valid = own_positions(mask, b, q_len, s_len, key.device)
    at = torch.arange(s_len, device=key.device)
    for i in range(0, q_len, block):
        rows = slice(i, min(i + block, q_len))
        sees = (at <= own[:, rows, None])[:, None]
        if mask is not None:
            sees = sees & _is_true(mask[:, :, rows, :s_len])
        logits = (query[:, :, rows].float() @ key.mT * scaling).masked_fill(~sees, -torch.inf)
        if sinks is not None:
            sink = sinks.float()[None, :, None, None].expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], -1)
        prob = logits.softmax(-1)[..., :s_len].nan_to_num(0.0)  # padding attends to nothing
        received += (prob.mean(1) * valid[:, rows, None]).sum(1)
    askers = valid.flip(1).cumsum(1).flip(1)  # of each token: itself and the later ones
    return received.gather(1, own) / askers.clamp(min=1), valid


def own_positions(
    mask: Tensor | None, b: int, q_len: int, s_len: int, device: torch.device
) -> tuple[Int[Tensor, "B Q"], Bool[Tensor, "B Q"]]:
    """(the key that is each query's own token, is the query no padding).

    Under a causal mask a token's last visible key is itself; padding sees none, or no new one.
    """
    if mask is None:
        own = torch.arange(s_len - q_len, s_len, device=device).expand(b, q_len)
        return own, torch.ones_like(own, dtype=torch.bool)
    sees = _is_true(mask[:, 0, :, :s_len]).expand(b, -1, -1)
    last = torch.where(sees.any(-1), s_len - 1 - sees.flip(-1).byte().argmax(-1), -1)
    before = torch.cat([last.new_full((b, 1), -1), last.cummax(1).values[:, :-1]], 1)
    return last.clamp(min=0), last > before


def _is_true(mask: Tensor) -> Bool[Tensor, " ..."]:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def protected_tokens(
    x: Float[Tensor, "B S H"],
    received: Float[Tensor, "B S"],
    valid: Bool[Tensor, "B S"],
    share: float,
) -> Bool[Tensor, "B S"]:
    """The `share` of each sequence's tokens with the largest |x|_1 * received; padding never."""
    worth = (x.float().abs().sum(-1) * received).masked_fill(~valid, -torch.inf)
    quota = (valid.sum(-1) * share).long()
    place = worth.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (place < quota[:, None]) & valid


METHOD = Method(
    paper="Huang et al. 2024, arXiv:2410.06270", options=Options, needs=needs, thresholds=thresholds
)
