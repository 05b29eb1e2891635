"""Fitting down projections to what a layer's experts gave before something was taken from them.

    minimise over D_e   sum over the tokens t of e  |r_t - c_te D_e a_te|^2  +  damp |D_e|^2

expert after expert: r is what the routed output lacks, c the coefficient that e now gets, a what enters its
down projection, and D what is added to that. As D = 0 is among what is tried, the error of the routed
output over the tokens never rises; where rounding D to the weights' dtype would let it, the weights stay.
Least squares on `down` after a merge are of MergeMoE (arXiv:2510.14436); its target is the mean of the
members' outputs, while this one is the layer's own, with the routing that there is now, so that it serves
dropping and narrowing as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moecule.experts import Experts
from moecule.hf import Streamed
from moecule.moe import Heard

DAMP = 0.01


@torch.no_grad()
def refit(
    streamed: Streamed,
    experts: Experts,
    heard: Heard,
    want: Sequence[Float[Tensor, "_T H"]],
    channels: Sequence[Tensor] | None = None,
) -> None:
    """Change the down projections in place, so that the layer's routed output comes nearer to `want`.

    `heard` is of the experts as they are. `channels`: those of each expert that count; None: all.
    """
    device, n = streamed.device, len(experts)
    top_k = heard.idx[0].shape[1] if heard.idx else 1
    lacks = [w.float() - r.float() for w, r in zip(want, heard.routed, strict=True)]
    for e, pairs in enumerate(heard.pairs(n)):
        full = experts.down.shape[2]
        at = torch.arange(full) if channels is None else channels[e].long()
        at = at.to(device)
        weight, filled = experts.down[e], [b for b, p in enumerate(pairs) if len(p)]
        width, height = len(at), weight.shape[0]
        gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        cross = torch.zeros(height, width, dtype=torch.float64, device=device)

        # a token may pick an expert twice, where router rows of several are one expert's
        tokens = {b: (pairs[b] // top_k).unique(return_inverse=True) for b in filled}

        def acts(
            b: int, e: int = e, at: Tensor = at, of: Sequence[Tensor] = pairs,
            tokens: Mapping[int, tuple[Tensor, Tensor]] = tokens,
        ) -> Tensor:  # fmt: skip
            token, place = tokens[b]
            each = heard.coef[b].flatten()[of[b]].float()
            coef = each.new_zeros(len(token)).index_add_(0, place, each).to(device)
            x = heard.x[b][token].to(device)
            return experts[e].act(x)[:, at].float() * coef[:, None]

        for b in filled:
            a, r = acts(b), lacks[b][tokens[b][0]].to(device)
            gram += (a.mT @ a).double()
            cross += (r.mT @ a).double()
        gram, cross = (streamed.ranks.add_up(t) for t in (gram, cross))
        damp = DAMP * gram.diagonal().mean()
        if not damp > 0:  # no token reached it
            continue
        damped = gram + damp * torch.eye(width, dtype=gram.dtype, device=device)
        more = torch.linalg.solve(damped, cross.mT).mT
        made = (weight[:, at].double() + more).to(weight.dtype)
        more = made.double() - weight[:, at].double()  # what rounding leaves of it
        if (more * (more @ gram - 2 * cross)).sum() >= 0:
            continue
        weight[:, at] = made
        for b in filled:
            less = acts(b) @ more.float().mT
            lacks[b][tokens[b][0]] -= less.to(lacks[b].device)
