"""Four languages of one grammar, made by seed: sentences to translate, or to mend where words are hidden.

A sentence is eight words of a Markov chain. Each language has tokens of its own for the words, and a rule
of its own for their order. An example is

    [into] [from] eight words [then] eight words [end]                translate
    [into] [mend] eight words, some hidden [then] eight words [end]   mend

the language that is wanted first. What follows is ours, for the paper's text was not at hand: half of the
examples are of either task, languages are drawn in proportion to n^(1/5) of sizes n that halve from one
to the next, and spans of Poisson(3) words are hidden until 35 % are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

LANGUAGES, WORDS, LENGTH = 4, 40, 8
TEMPERATURE = 5.0
HIDDEN_SHARE, SPAN = 0.35, 3.0
SMOOTHING = 0.1
TAGS = 0  # tokens: a tag a language, then
MEND, HIDE, THEN, END = range(LANGUAGES, LANGUAGES + 4)
FIRST_WORD = END + 1
VOCABULARY = FIRST_WORD + LANGUAGES * WORDS
BEGIN = LENGTH + 3  # place of the answer's first word
WINDOW = BEGIN + LENGTH + 1
FOLLOWERS = 4  # words that may follow a word, likelier ones first
WEIGHTS = (8, 4, 2, 1)
ORDERS = (  # of words, by language
    list(range(LENGTH)),
    list(range(LENGTH))[::-1],
    [i ^ 1 for i in range(LENGTH)],
    [(i + 1) % LENGTH for i in range(LENGTH)],
)
Direction = tuple[int, int]  # from, into; equal: mend
TRANSLATIONS = [(a, b) for a in range(LANGUAGES) for b in range(LANGUAGES) if a != b]


@dataclass(frozen=True)
class World:
    """What is the same for all text: the grammar and the ciphers."""

    follows: list[list[int]]
    ciphers: list[list[int]]

    @staticmethod
    def of(seed: int) -> World:
        """Drawn by lot."""
        lot = random.Random(seed)
        words = range(WORDS)
        return World(
            [lot.sample(words, FOLLOWERS) for _ in words],
            [lot.sample(words, WORDS) for _ in range(LANGUAGES)],
        )

    def sentence(self, lot: random.Random) -> list[int]:
        """Words of no language yet."""
        out = [lot.randrange(WORDS)]
        while len(out) < LENGTH:
            out += lot.choices(self.follows[out[-1]], WEIGHTS)
        return out

    def said(self, words: list[int], language: int) -> list[int]:
        """Its tokens, in its order."""
        base, cipher = FIRST_WORD + language * WORDS, self.ciphers[language]
        return [base + cipher[words[i]] for i in ORDERS[language]]

    def example(self, direction: Direction, lot: random.Random) -> list[int]:
        """One window."""
        source, into = direction
        words = self.sentence(lot)
        given, wanted = self.said(words, source), self.said(words, into)
        tag = TAGS + source if source != into else MEND
        return [into, tag, *(given if source != into else _hidden(given, lot)), THEN, *wanted, END]


def _hidden(words: list[int], lot: random.Random) -> list[int]:
    out, most = list(words), max(1, round(HIDDEN_SHARE * len(words)))
    while out.count(HIDE) < most:
        start, n = lot.randrange(len(out)), _poisson(lot)
        for i in range(start, min(start + n, len(out))):
            if out.count(HIDE) < most:
                out[i] = HIDE
    return out


def _poisson(lot: random.Random) -> int:
    """How many arrive in SPAN units of time."""
    n, time = 0, lot.expovariate(1.0)
    while time < SPAN:
        n, time = n + 1, time + lot.expovariate(1.0)
    return n


def examples(
    world: World, n: int, seed: int, into: tuple[int, ...] = tuple(range(LANGUAGES))
) -> Int[Tensor, "n S"]:
    """n windows of both tasks; `into`: languages that are asked for."""
    lot = random.Random(seed)
    sizes = [(0.5**language) ** (1 / TEMPERATURE) for language in range(LANGUAGES)]
    out = []
    for _ in range(n):
        (wanted,) = lot.choices(into, [sizes[b] for b in into])
        others = [a for a in range(LANGUAGES) if a != wanted]
        (source,) = lot.choices(others, [sizes[a] for a in others])
        mends = lot.random() < 0.5
        out.append(world.example((wanted if mends else source, wanted), lot))
    return torch.tensor(out)


def answer_loss(logits: Float[Tensor, "B S V"], ids: Int[Tensor, "B S"]) -> Float[Tensor, ""]:
    """Cross entropy of the answer, labels smoothed."""
    return nn.functional.cross_entropy(
        logits[:, BEGIN - 1 : -1].float().flatten(0, 1),
        ids[:, BEGIN:].flatten(),
        label_smoothing=SMOOTHING,
    )


@torch.no_grad()
def exact(model: nn.Module, world: World, n: int, seed: int) -> dict[str, float]:
    """{direction: share of n sentences that greedy decoding answers without a mistake}

    In one pass: it is without a mistake just where every word is the likeliest after the right ones.
    """
    lot, out = random.Random(seed), {}
    for source, into in [*TRANSLATIONS, *((a, a) for a in range(LANGUAGES))]:
        ids = torch.tensor([world.example((source, into), lot) for _ in range(n)])
        said = model(input_ids=ids, use_cache=False).logits[:, BEGIN - 1 : -1].argmax(-1)
        name = f"{source}>{into}" if source != into else f"mend {source}"
        out[name] = (said == ids[:, BEGIN:]).all(1).float().mean().item()
    return out
