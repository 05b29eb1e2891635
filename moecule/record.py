"""How a model calls its decoder layers, noted without computing one; and what it does after the last.

The layers are swapped for stand-ins while the model's own forward runs. So embeddings, masks,
rotary tables, final norms and scaled logits are the model's, whatever they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecule.batch import Batch
from moecule.errors import CheckpointError
from moecule.moe import find_layers

Take = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Call:
    """How one layer is called for one batch, besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    added: Float[Tensor, "B S *H"] | None = None  # to the hidden states, before the layer
    takes: str | None = None  # the argument for what the layer before handed on

    def __call__(
        self, layer: nn.Module, hidden: Float[Tensor, "B S *H"], handed: Tensor | None = None
    ) -> tuple[Float[Tensor, "B S *H"], Tensor | None]:
        """The layer's output, and what it hands to the next layer besides, if anything."""
        if self.added is not None:
            hidden = hidden + self.added
        kwargs = self.kwargs if self.takes is None else {**self.kwargs, self.takes: handed}
        out = layer(hidden, *self.args, **kwargs)
        if self.takes is not None:
            return out[0], out[1]
        return out[0] if isinstance(out, tuple) else out, None


class _StandIn(nn.Module):
    """In a layer's place: hands on what it is called with."""

    def __init__(self, index: int, layer: nn.Module, take: Take, takes: str | None) -> None:
        super().__init__()
        self.index, self.take, self.takes = index, take, takes
        object.__setattr__(self, "_layer", layer)  # no submodule

    def __getattr__(self, name: str) -> Any:  # models ask layers for e.g. attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        out = self.take(self.index, hidden, tuple(rest), kwargs)
        return out if self.takes is None else (out, None)


@contextmanager
def _stand_ins(model: nn.Module, take: Take, takes: str | None) -> Iterator[None]:
    name, layers = find_layers(model)
    above, _, leaf = name.rpartition(".")
    parent = model.get_submodule(above)
    setattr(parent, leaf, nn.ModuleList(_StandIn(i, x, take, takes) for i, x in enumerate(layers)))
    try:
        yield
    finally:
        setattr(parent, leaf, layers)


@dataclass
class _Tape:
    """What stand-ins were given. Each returns `probe`, zeros if there is none."""

    probe: Tensor | None = None
    takes: str | None = None
    embedded: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    last: Tensor | None = None

    def take(
        self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        if index != len(self.calls):
            raise CheckpointError(
                f"the model calls layer {index} where layer {len(self.calls)} is due, so it cannot be "
                "walked layer by layer; its family is not served, see `moecule families`"
            )
        # a tensor of ours that comes back untouched: nothing happens between the two layers
        plain = self.last is None or (hidden is self.last and hidden._version == 0)
        self.calls.append(Call(args, kwargs, None if plain else hidden, self.takes))
        if self.embedded is None:
            self.embedded = hidden
        if self.last is None or not plain:
            self.last = torch.zeros_like(hidden) if self.probe is None else self.probe.clone()
        return self.last


@torch.no_grad()
def record(
    model: Any, batch: Batch, like: Sequence[Call] | None = None, takes: str | None = None
) -> tuple[Float[Tensor, "B S *H"], list[Call]]:
    """(what enters the first layer, how each layer is called). No layer is computed.

    `like`: calls of another batch; tensors equal to theirs are shared, not kept twice. `takes`: as
    in Family.
    Raises CheckpointError where something other than a sum happens between two layers.
    """
    tape = _taped(model, batch, None, takes)
    assert tape.embedded is not None  # as many calls as layers were counted
    if any(c.added is not None for c in tape.calls):
        g = torch.Generator().manual_seed(0)
        shape = tape.embedded.shape
        probe = torch.randn(shape, generator=g).to(tape.embedded.device, tape.embedded.dtype)
        _check_sums(tape, _taped(model, batch, probe, takes))
    calls = tape.calls
    if like is not None:
        memo: dict[int, Any] = {}
        calls = [_shared(c, k, memo) for c, k in zip(calls, like, strict=True)]
    return tape.embedded, calls


def _taped(model: Any, batch: Batch, probe: Tensor | None, takes: str | None) -> _Tape:
    tape = _Tape(probe, takes)
    _, layers = find_layers(model)
    with _stand_ins(model, tape.take, takes):
        model.base_model(**inputs_of(batch, model), use_cache=False)
    if len(tape.calls) != len(layers):
        raise CheckpointError(
            f"the model has {len(layers)} layers and calls {len(tape.calls)}, so it cannot be walked "
            "layer by layer; its family is not served, see `moecule families`"
        )
    return tape


def _check_sums(zeros: _Tape, probed: _Tape) -> None:
    """Raise CheckpointError where what happens between layers is not the addition of a constant."""
    assert probed.probe is not None
    for i, (a, b) in enumerate(zip(zeros.calls, probed.calls, strict=True)):
        if i == 0 or (a.added is None and b.added is None):
            continue
        want = probed.probe if a.added is None else probed.probe + a.added
        if b.added is None or b.added.shape != want.shape or not torch.allclose(b.added, want):
            raise CheckpointError(
                f"the model changes hidden states between layers {i - 1} and {i}, so it cannot be "
                "walked layer by layer; its family is not served, see `moecule families`"
            )


def _shared(call: Call, like: Call, memo: dict[int, Any]) -> Call:
    if len(call.args) != len(like.args) or call.kwargs.keys() != like.kwargs.keys():
        return call
    args = tuple(_same(a, b, memo) for a, b in zip(call.args, like.args, strict=True))
    kwargs = {k: _same(v, like.kwargs[k], memo) for k, v in call.kwargs.items()}
    shared = [
        *map(operator.is_, args, like.args),
        *(v is like.kwargs[k] for k, v in kwargs.items()),
    ]
    if all(shared) and call.added is like.added:
        return like  # one call of a layer for all batches
    return replace(call, args=args, kwargs=kwargs)


def _same(new: Any, old: Any, memo: dict[int, Any]) -> Any:
    """`old` where `new` holds the same; layers are mostly given one and the same tensor."""
    if id(new) not in memo:
        # the memo holds `new` too, so that no other object gets its id meanwhile
        memo[id(new)] = (new, _compared(new, old, memo))
    return memo[id(new)][1]


def _compared(new: Any, old: Any, memo: dict[int, Any]) -> Any:
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        alike = (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
        return old if alike and torch.equal(new, old) else new
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        found = tuple(_same(a, b, memo) for a, b in zip(new, old, strict=True))
        return old if all(map(operator.is_, found, old)) else found
    return new  # what a layer may write into stays the batch's own


def logits(
    model: Any, hidden: Float[Tensor, "B S *H"], batch: Batch, takes: str | None = None
) -> Float[Tensor, "B S V"]:
    """Of the last layer's output for `batch`, in float32, by all that the model does after it."""
    with _stand_ins(model, lambda index, given, args, kwargs: hidden, takes):
        out: Tensor = model(**inputs_of(batch, model), use_cache=False).logits
    return out.float()


def inputs_of(batch: Batch, model: Any) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward, on its device and in its dtype."""
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    weight = model.get_input_embeddings().weight
    return {
        name: t.to(device=weight.device, dtype=weight.dtype if t.is_floating_point() else t.dtype)
        for name, t in given.items()
        if name != "labels"
    }
