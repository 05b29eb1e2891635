"""One MoE layer's routed experts, the same shape for every model family.

Letters for tensor axes, the same in every file:
    L layers   E experts   K experts per token   T tokens (t: those at one expert)
    H hidden width   F expert width (channels)   R rows of the first matrix: 2F gated, F not
    M N rows and columns of any weight   G groups of columns that share a scale
    B sequences   S tokens of a sequence
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Gate = Callable[[Tensor], Tensor]  # [t, R] -> [t, F]: the family's activation and product


@dataclass(frozen=True)
class Expert:
    """One expert: down( gate( gate_up x ) ).

    Gate and up are one matrix because they read the same input, so they share a Hessian.
    Its rows stay in the order of the model's own module (concatenated or interleaved).
    """

    gate_up: Float[Tensor, "R H"]
    down: Float[Tensor, "H F"]
    gate: Gate
    gate_up_bias: Float[Tensor, " R"] | None = None
    down_bias: Float[Tensor, " H"] | None = None
    end: Gate | None = None  # a norm of the output

    def taken(self, rows: Int[Tensor, " r"], channels: Int[Tensor, " c"]) -> Expert:
        """Of these channels, in their order; `rows` are theirs of the first matrix."""
        bias = self.gate_up_bias
        return replace(
            self,
            gate_up=self.gate_up[rows],
            down=self.down[:, channels],
            gate_up_bias=None if bias is None else bias[rows],
        )

    def act(self, x: Float[Tensor, "t H"]) -> Float[Tensor, "t F"]:
        """What enters the down projection."""
        return self.gate(F.linear(x, self.gate_up, self.gate_up_bias))

    def out(self, act: Float[Tensor, "t F"]) -> Float[Tensor, "t H"]:
        """The expert's output for its activations, before the router's coefficient."""
        out = F.linear(act, self.down, self.down_bias)
        return out if self.end is None else self.end(out)

    def __call__(self, x: Float[Tensor, "t H"]) -> Float[Tensor, "t H"]:
        return self.out(self.act(x))


@dataclass(frozen=True)
class Experts:
    """All routed experts of a layer, stacked."""

    gate_up: Float[Tensor, "E R H"]
    down: Float[Tensor, "E H F"]
    gate: Gate
    gate_up_bias: Float[Tensor, "E R"] | None = None
    down_bias: Float[Tensor, "E H"] | None = None
    end: Gate | None = None

    def __len__(self) -> int:
        return len(self.gate_up)

    def __getitem__(self, e: int) -> Expert:
        return Expert(
            self.gate_up[e],
            self.down[e],
            self.gate,
            None if self.gate_up_bias is None else self.gate_up_bias[e],
            None if self.down_bias is None else self.down_bias[e],
            self.end,
        )

    def select(self, ids: Sequence[int]) -> Experts:
        """The experts `ids`, in that order."""
        at = list(ids)
        return Experts(
            self.gate_up[at],
            self.down[at],
            self.gate,
            None if self.gate_up_bias is None else self.gate_up_bias[at],
            None if self.down_bias is None else self.down_bias[at],
            self.end,
        )

    @property
    def weights_per_expert(self) -> int:
        """Weights of one expert's matrices; biases are not counted."""
        return self.gate_up[0].numel() + self.down[0].numel()
