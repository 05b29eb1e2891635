"""What is dense on a GPU: packed Linears, and the router of a MoE block."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moecule.kernels import grouped, grouped_int8, ops, routing, unpack
from moecule.kernels.matrices import Matrices
from moecule.packed import Packed, packed_of

# By bench.dense on an H100. Tokens up to which a Linear reads its codes anew for each: 4 bits cross
# unpacking the weight at 12 to 24, 8 bits at 7 to 16. From so many rows on tiles of 64 fill the GPU, and
# grouped products are ahead of both (crossing measured between 4096 and 32000 rows), up to so many tokens
FEW_TOKENS, WIDE, WIDE_TOKENS = 12, 2**14, 256
FEW_ROWS, THIN = 8, 1024  # tokens, and rows of a weight, that a router's kernels are for


def found_once(
    module: Any, place_of: Callable[[Any], int | None], made: Callable[[Any], Any]
) -> Any:
    """What `made` finds of a module, until its weights are moved."""
    if torch.compiler.is_compiling() and "there" in vars(module):
        return module.there
    return _find(module, place_of, made)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _find(module: Any, place_of: Callable[[Any], int | None], made: Callable[[Any], Any]) -> Any:
    place = place_of(module)
    if "there" not in vars(module) or module.place != place:
        module.there, module.place = None if place is None else made(module), place
    return module.there


def weight_there(module: Any) -> Matrices | None:
    """A Linear's weight, found once; None where the kernels do not serve it."""
    found: Matrices | None = found_once(module, _place_of_weight, _weight_of)
    return found


def _place_of_weight(module: Any) -> int:
    place: int = module.weight_codes.data_ptr()
    return place


def _weight_of(module: Any) -> Matrices | None:
    return Matrices.of([packed_of(module, "weight")])


class Made(NamedTuple):
    """What was made of one x for all peers."""

    x: Tensor
    version: int | None  # of x: it may be changed in place
    y: Float[Tensor, "T M"]
    left: tuple[int, ...]  # where in y the parts begin that were not handed out


@dataclass(eq=False)
class Peers:
    """Linears of one parent that are given the same x, as an attention's q, k and v: multiplied at once.

    Which they are is seen while they run; what was made for all is handed out as they are called.
    """

    members: list[Any] = field(default_factory=list)
    seen: Callable[[], Tensor | None] | None = None  # the last x, while it lives
    before: Any = None  # the Linear that was given it first
    all: tuple[Matrices, Int[Tensor, " chunks"]] | None = None  # in pieces of as many rows
    made: Made | None = None

    def __reduce__(self) -> Any:
        return Peers, ()  # a copy sees for itself

    def see(self, module: Any, x: Tensor) -> None:
        """Note who is given what, and where it lies now."""
        if module not in self.members:
            module.span = None  # of what this is a copy of
        if self.seen is None or self.seen() is not x:
            self.seen, self.before = weakref.ref(x), module
        elif module not in (self.before, *self.members):
            self._join([*(self.members or [self.before]), module])
        if module.span is not None and module.span[2] is not module.there:  # moved
            self._join(self.members)

    def _join(self, members: list[Any]) -> None:
        weights = [packed_of(m, "weight") for m in members]
        rows = math.gcd(*(len(w.codes) for w in weights))
        found = Matrices.of([piece for w in weights for piece in _pieces(w, rows)])
        self.members, self.all, self.made, start = members, None, None, 0
        if found is not None and rows % 8 == 0:  # else programs would take rows of two pieces
            chunks = torch.arange(len(found), device=found.table.device).repeat(FEW_TOKENS)
            torch._dynamo.mark_static_address(chunks)
            self.all = found, chunks
        for m in members:
            m.span = start, start + m.out_features, weight_there(m)
            start += m.out_features

    def times(
        self, module: Any, x: Tensor, flat: Float[Tensor, "T N"]
    ) -> Float[Tensor, "T M"] | None:
        """x times a member's weight; None where it has to be multiplied alone."""
        if self.all is None or module.span is None:
            return None
        start, end, _ = module.span
        version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
        made = self.made  # read once: another thread may put its own here
        if made is None or made.x is not x or made.version != version or start not in made.left:
            of, chunks = self.all
            given = [flat] if module.exact else ops.rounded(flat, of)
            y = ops.products(given, of, chunks[: len(flat) * len(of)], len(of), flat)
            left = tuple(m.span[0] for m in self.members)
            made = Made(x, version, y.view(len(flat), -1), left)
        left = tuple(at for at in made.left if at != start)
        # when all are handed out nothing is kept, nor may a compiled step keep it
        self.made = made._replace(left=left) if left else None
        return made.y[:, start:end]


def _pieces(weight: Packed, rows: int) -> list[Packed]:
    """A weight, so many rows at a time."""
    zero = weight.zero
    return [
        replace(
            weight,
            codes=weight.codes[at : at + rows],
            scale=weight.scale[at : at + rows],
            zero=None if zero is None else zero[at : at + rows],
        )
        for at in range(0, len(weight.codes), rows)
    ]


def linear(module: Any, x: Float[Tensor, "*B N"], of: Matrices) -> Float[Tensor, "T M"]:
    """x times the transposed weight of a Linear, which lies at `of`."""
    flat = x.reshape(-1, x.shape[-1])
    peers = module.peers
    if peers is not None and not torch.compiler.is_compiling():
        peers.see(module, x)
    wide = of.rows >= WIDE and 1 < len(flat) <= WIDE_TOKENS
    if wide and not (module.exact and x.dtype == torch.float32):  # the matrix units take 16 bits
        return tiled(flat, of, exact=module.exact)
    if len(flat) > FEW_TOKENS:
        if peers is not None:
            peers.made = None
        return nn.functional.linear(flat, unpack.unpacked(of, 0, x.dtype))
    made: Tensor | None = None if peers is None else peers.times(module, x, flat)
    if made is not None:
        return made
    return ops.products([flat] if module.exact else ops.rounded(flat, of), of, None, 1, flat)


def tiled(flat: Float[Tensor, "T N"], of: Matrices, *, exact: bool) -> Float[Tensor, "T M"]:
    """x times one transposed weight, as grouped products make those of an expert with all tokens."""
    all_its = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    if exact:
        pairs = ops.sorted_pairs(all_its, 1, grouped.CUTS)
        return ops.exact_products(ops.arranged(flat, of), pairs.order, of, pairs)
    pairs = ops.sorted_pairs(all_its, 1, grouped_int8.CUTS)
    return ops.tiled_products(ops.tiled(flat, None, of, pairs), of, pairs, flat)


class _Picked(NamedTuple):
    values: Tensor
    indices: Tensor


class QuickRouting(TorchFunctionMode):
    """Within, a few tokens' products with a thin weight and choices of the largest are kernels of ours.

    For a MoE block while it is traced, whose router, of whatever family, asks torch for both.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            return _topk(func, *args, **kwargs)
        if func is nn.functional.linear:
            return _thin(*args, **kwargs)
        return func(*args, **kwargs)


def _topk(
    plain: Callable[..., Any], x: Tensor, k: int, dim: int = -1, largest: bool = True, **how: Any
) -> Any:
    last = dim in (-1, x.dim() - 1) and largest and "out" not in how
    if not (last and x.dim() == 2 and len(x) <= FEW_ROWS and x.shape[1] <= routing.MOST):
        return plain(x, k, dim, largest, **how)
    return _Picked(*ops.picked(x, k))


def _thin(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    few = len(flat) <= FEW_ROWS and len(weight) <= THIN and x.dtype == weight.dtype
    if not few or bias is not None:
        return nn.functional.linear(x, weight, bias)
    return ops.thin(flat, weight).view(*x.shape[:-1], len(weight))
