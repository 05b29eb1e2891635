"""How far a layer's routed experts turn the residual stream: 1 - its cosine before and after."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecule.errors import CheckpointError


class Before:
    """Finds the residual stream that a MoE block reads: what its norm was given, or its own input."""

    def __init__(self, layer: nn.Module, block: nn.Module | None) -> None:
        """`block`: None where the layer itself is the block; then a norm gives the experts' input."""
        self.layer, self.block = layer, block
        self.given: Tensor | None = None  # to the block
        self.norms: list[tuple[Tensor, Tensor]] = []  # (input, output) of the layer's own norms

    def hooks(self) -> list[Any]:
        """Listening to the layer's norms and the block."""

        def on_norm(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.norms.append((args[0].detach(), out.detach()))

        def on_block(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            self.given = found[0].detach()

        norms = [m for m in self.layer.children() if "norm" in type(m).__name__.lower()]
        handles = [m.register_forward_hook(on_norm) for m in norms]
        if self.block is not None:
            handles.append(self.block.register_forward_pre_hook(on_block, with_kwargs=True))
        return handles

    def of(self, x: Float[Tensor, "T _N"], out: Float[Tensor, "T H"]) -> Float[Tensor, "T H"]:
        """Of the experts' input and output. Raises CheckpointError where the stream is not found."""
        read = x if self.given is None else self.given
        found = [h for h, normed in self.norms if normed.data_ptr() == read.data_ptr()]
        whole = self.given if not found else found[-1]
        self.norms.clear()
        if whole is None or whole.numel() != out.numel():
            raise CheckpointError(
                f"{type(self.layer).__name__}: the residual stream before its experts is not "
                "found, which this recipe reads; use another, such as reap"
            )
        return whole.reshape(out.shape)


@torch.no_grad()
def turn_of(before: Float[Tensor, "T H"], added: Float[Tensor, "T H"]) -> Float[Tensor, " T"]:
    """1 - cosine of `before` and `before + added`: half the square between the two unit vectors.

    So written it keeps its figures where it is small, and is never below 0.
    """
    a, b = before.float(), before.float() + added.float()
    unit = nn.functional.normalize
    return (unit(a, dim=-1) - unit(b, dim=-1)).square().sum(-1) / 2
