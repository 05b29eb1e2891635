"""A packed model that runs with masks while they are learnt: drawn, hard, or with all experts.

Heads are parameters, all else stays. Experts are unpacked, once, and run as `thaw` has them, for
gradients pass through later layers back to earlier masks. Pairs that are masked run too, with
coefficient 0: the gradient of a mask is what its experts would have given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moecule.family import Family
from moecule.hf import set_experts
from moecule.methods import otp
from moecule.moe import find_layers, find_moe
from moecule.ranks import SOLO, Ranks
from moecule.train.loop import Loss
from moecule.train.losses import distil
from moecule.train.shards import average
from moecule.train.thaw import hold, thaw, thawed_forward

EXPERTS = "moecule_masked"  # the name of `masked_forward` in transformers' experts interface
STIFF = 1.0  # nats a unit of the gap's square
ROUNDS = 3  # masks change what later layers hear, so the offset is found more than once
HALVINGS = 30  # of the offset's range
Head = Mapping[str, Float32[Tensor, " ..."]]


@dataclass
class Mode:
    """How all layers run, and what they note."""

    how: Literal["all", "drawn", "hard"] = "all"
    tau: float = 1.0
    offset: float = 0.0  # added to the score of every further expert, where masks are hard
    ranks: Ranks = SOLO
    run: list[Float[Tensor, ""]] = field(default_factory=list)  # of each layer: pairs that ran
    pairs: int = 0  # all there were
    scores: list[Float32[Tensor, "T K"]] = field(default_factory=list)

    def set(self, how: Literal["all", "drawn", "hard"]) -> None:
        """Another way, and nothing noted yet."""
        self.how, self.run, self.pairs, self.scores = how, [], 0, []


class MaskedLayer(nn.Module):
    """The head of one layer while it learns."""

    def __init__(self, head: Head, mode: Mode, renormalised: bool) -> None:
        super().__init__()
        self.mode, self.renormalised = mode, renormalised
        for name, tensor in head.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))

    def forward(self, x: Float[Tensor, "T H"], coef: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
        """Coefficients, 0 where a pair is masked; drawn masks have a gradient there, too."""
        mode = self.mode
        if mode.how == "all":
            return coef
        ordered, order = otp.ranked(coef)
        scores = otp.scores(dict(self.named_parameters()), x, ordered)
        if mode.how == "drawn":
            # the noise of all processes' windows: they draw as one would
            size, at = len(x), mode.ranks.rank
            noise = torch.rand(size * mode.ranks.size, scores.shape[1], device=x.device)
            mask = otp.drawn(scores, noise[at * size : (at + 1) * size], mode.tau)
        else:
            mode.scores.append(scores)
            mask = otp.hard(shifted(scores, mode.offset)).to(coef.dtype)
        mode.run.append(mask.sum())
        mode.pairs += mask.numel()
        return otp.weighed(coef, otp.unranked(mask, order), self.renormalised)


def shifted(scores: Float32[Tensor, "T K"], offset: float) -> Float32[Tensor, "T K"]:
    """Scores with the offset: r times for r experts more than the first."""
    return scores + offset * torch.arange(scores.shape[-1], device=scores.device)


def masked_forward(
    self: Any, hidden: Float[Tensor, "T H"], idx: Int[Tensor, "T K"], coef: Float[Tensor, "T K"]
) -> Float[Tensor, "T H"]:
    """The forward of an experts module whose masks learn."""
    return thawed_forward(self, hidden, idx, self.masks(hidden, coef))


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, masked_forward)


class Pupil(nn.Module):
    """The model, and the price of a pair."""

    def __init__(
        self, model: Any, family: Family, heads: Mapping[int, Head], aim: float, ranks: Ranks = SOLO
    ) -> None:
        """`heads` by layer; `aim`: the share of pairs that is to run."""
        super().__init__()
        self.model, self.aim, self.ranks = model, aim, ranks
        self.mode = Mode(ranks=ranks)
        self.layers: dict[int, MaskedLayer] = {}
        model.requires_grad_(False)
        thaw(model)
        hold(model)
        set_experts(model, EXPERTS)
        model.requires_grad_(False)
        renormalised = family.is_renormalised(model.config.get_text_config())
        for i, layer in enumerate(find_layers(model)[1]):
            moe = find_moe(layer, family)
            if moe is not None:
                made = MaskedLayer(heads[i], self.mode, renormalised).to(model.device)
                self.layers[i] = moe.experts.masks = made
        self.price = nn.Parameter(torch.zeros(1, device=model.device))
        if ranks.size > 1:
            average((p for p in self.parameters() if p.requires_grad), ranks)

    def forward(
        self, how: Literal["all", "drawn", "hard"], ids: Int[Tensor, "B S"]
    ) -> Float[Tensor, "B S V"]:
        """Logits."""
        self.mode.set(how)
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def heads(self) -> dict[int, dict[str, Float32[Tensor, " ..."]]]:
        """By layer, as they are now."""
        return {
            i: {n: p.detach().clone() for n, p in layer.named_parameters()}
            for i, layer in self.layers.items()
        }


def loss_of(tau: list[float]) -> Loss:
    """What is minimised of a batch of windows; `tau` has the temperature of the step."""

    def loss(model: Pupil, ids: Int[Tensor, "B S"]) -> Float[Tensor, ""]:
        with torch.no_grad():
            wanted = model("all", ids)
        model.mode.tau = tau[0]
        kl = distil(model("drawn", ids), wanted)
        keep = torch.stack(model.mode.run).sum() / model.mode.pairs
        everywhere = model.ranks.add_up(keep.detach().double().cpu()) / model.ranks.size
        gap = float(everywhere) - model.aim
        price = model.price[0]
        # the last term is 0, and its gradient lets the price climb
        return kl + (price.detach() + STIFF * gap) * keep - (price - price.detach()) * gap

    return loss


@dataclass(frozen=True)
class Settled:
    """Hard masks, brought to the share that is wanted."""

    offset: float
    keep: float  # the share that ran
    kl_nats: float  # a token, to all experts running


@torch.no_grad()
def settle(pupil: Pupil, windows: Int[Tensor, "N S"], each: int) -> Settled:
    """Find the offset with which no more pairs run than aimed at, on `windows`, `each` at a time."""
    mode, ranks = pupil.mode, pupil.ranks
    mine = torch.stack(ranks.mine(list(windows))).split(each)
    mode.offset = 0.0
    for _ in range(ROUNDS):
        scores: list[Tensor] = []
        for part in mine:
            pupil("hard", part.to(pupil.price.device))
            scores += mode.scores
        mode.offset = _offset(scores, pupil.aim, ranks)
    total = torch.zeros(3, dtype=torch.float64)
    for part in mine:
        ids = part.to(pupil.price.device)
        wanted = pupil("all", ids)
        kl = distil(pupil("hard", ids), wanted).double().cpu()
        run = torch.stack(mode.run).sum().double().cpu()
        total += torch.stack([len(part) * kl, run, torch.tensor(mode.pairs).double()])
    kl, run, pairs = ranks.add_up(total).tolist()
    return Settled(mode.offset, run / pairs, kl / len(windows))


def _offset(scores: list[Float32[Tensor, "_T _K"]], aim: float, ranks: Ranks) -> float:
    """One with which these scores run as many of the pairs as can be, but no more than `aim`.

    In the middle of all that do: at the edge, rounding would turn a pair.
    """

    def ran(offset: float) -> float:
        run = sum(otp.hard(shifted(s, offset)).sum() for s in scores)
        return float(ranks.add_up(torch.as_tensor(run).double().cpu()))

    def edge(low: float, high: float, most: float) -> tuple[float, float]:
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if ran(middle) <= most else (low, middle)
        return low, high

    count = torch.tensor(sum(s.numel() for s in scores), dtype=torch.float64)
    pairs = float(ranks.add_up(count))
    spread = torch.stack([s.amax() - s.amin() for s in scores]).amax()
    reach = 1.0 + float(ranks.add_up(spread.double().cpu(), greatest=True))
    if ran(reach) <= aim * pairs:
        return reach
    highest, _ = edge(-reach, reach, aim * pairs)
    _, lowest = edge(-reach, highest, ran(highest) - 0.5)
    return (lowest + highest) / 2
