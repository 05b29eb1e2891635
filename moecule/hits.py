"""How often an expert is on the device already, where only some of each layer's fit there.

One layer at a time: the experts that its tokens need, token after token, as decoding meets them. A token
needs all its experts at once; those not there are brought in, and others leave for them:

    lru       whoever was used longest ago (Eliseev and Mazur, arXiv:2312.17238)
    lfu       whoever was used least often so far; of those, longest ago
    next_gate as lru, and before the token comes, what the layer's own router makes of what the
              router of the MoE layer before was given, is brought in (the same paper's speculation)
    optimal   whoever is not needed for longest: no policy has more hits without guessing (Belady, 1966)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Uses = Sequence[Sequence[int]]  # the experts of each token
POLICIES = ("lru", "lfu", "next_gate", "optimal")


@dataclass(frozen=True)
class Hits:
    """What a policy did over all tokens of a layer."""

    uses: int  # (token, expert) pairs
    hits: int  # of them, whose expert was there when the token came
    loads: int  # experts brought in, needed or guessed in vain


def simulate(policy: str, uses: Uses, size: int, guesses: Uses | None = None) -> Hits:
    """One of POLICIES with room for `size` experts of a layer, as many as a token needs or more.

    `guesses`: for "next_gate", which experts each token was thought to need; without any it is "lru".
    """
    if policy == "lfu":
        return _lfu(uses, size)
    if policy == "optimal":
        return _optimal(uses, size)
    return _lru(uses, size, guesses if policy == "next_gate" else None)


def recall(uses: Uses, guesses: Uses) -> float:
    """The share of needed experts that were guessed."""
    right = sum(len({*need} & {*guess}) for need, guess in zip(uses, guesses, strict=True))
    return right / max(sum(map(len, uses)), 1)


def _lru(uses: Uses, size: int, guesses: Uses | None) -> Hits:
    held = OrderedDict[int, None]()  # used longest ago first
    hits = loads = 0

    def bring(wanted: Sequence[int]) -> int:
        missing = [e for e in wanted if e not in held]
        for e in wanted:  # first, so that nobody who is wanted leaves
            if e in held:
                held.move_to_end(e)
        for e in missing:
            if len(held) >= size:
                held.popitem(last=False)
            held[e] = None
        return len(missing)

    for t, needed in enumerate(uses):
        if guesses is not None:
            loads += bring(guesses[t])
        missed = bring(needed)
        hits, loads = hits + len(needed) - missed, loads + missed
    return Hits(sum(map(len, uses)), hits, loads)


def _lfu(uses: Uses, size: int) -> Hits:
    count, last = dict[int, int](), dict[int, int]()

    def worth(t: int, e: int) -> tuple[int, int]:
        return count[e], last[e]

    def note(t: int, e: int) -> None:
        count[e], last[e] = count.get(e, 0) + 1, t

    return _by_worth(uses, size, worth, note)


def _optimal(uses: Uses, size: int) -> Hits:
    # backwards: when the expert is needed again after token t
    again, ahead = dict[tuple[int, int], int](), dict[int, int]()
    for t in range(len(uses) - 1, -1, -1):
        for e in uses[t]:
            again[t, e] = ahead.get(e, len(uses))
        ahead |= dict.fromkeys(uses[t], t)
    following = dict[int, int]()

    def worth(t: int, e: int) -> tuple[int, int]:
        return -following[e], -e

    def note(t: int, e: int) -> None:
        following[e] = again[t, e]

    return _by_worth(uses, size, worth, note)


def _by_worth(
    uses: Uses,
    size: int,
    worth: Callable[[int, int], tuple[int, int]],
    note: Callable[[int, int], None],
) -> Hits:
    """Whoever is worth least at token t leaves, of those that the token does not need."""
    held, loads = set[int](), 0
    for t, needed in enumerate(uses):
        for e in needed:
            note(t, e)
        for e in needed:
            if e not in held:
                loads += 1
                if len(held) >= size:
                    held.remove(min(held.difference(needed), key=lambda x: worth(t, x)))
                held.add(e)
    total = sum(map(len, uses))
    return Hits(total, total - loads, loads)
