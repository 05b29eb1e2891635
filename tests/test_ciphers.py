"""The text of the multitask toy: one sentence in several languages, whole or with words hidden."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
ciphers = pytest.importorskip("experiments.zcode.ciphers")  # the source distribution has none


def test_every_language_says_the_same_in_its_own_words_and_order():
    world = ciphers.World.of(3)
    words = world.sentence(random.Random(0))
    said = [world.said(words, language) for language in range(ciphers.LANGUAGES)]
    assert len({*sum(said, [])}) <= len({*words}) * ciphers.LANGUAGES
    for language, tokens in enumerate(said):
        base = ciphers.FIRST_WORD + language * ciphers.WORDS
        back = [world.ciphers[language].index(t - base) for t in tokens]
        order = ciphers.ORDERS[language]
        assert [back[order.index(i)] for i in range(len(words))] == words
    assert max(sum(said, [])) < ciphers.VOCABULARY


def test_a_sentence_follows_the_grammar():
    world, lot = ciphers.World.of(0), random.Random(1)
    for _ in range(20):
        words = world.sentence(lot)
        assert all(b in world.follows[a] for a, b in zip(words, words[1:], strict=False))


def test_examples_are_of_both_tasks_and_made_by_seed():
    world = ciphers.World.of(0)
    ids = ciphers.examples(world, 400, seed=5)
    assert torch.equal(ids, ciphers.examples(world, 400, seed=5))
    assert ids.shape == (400, ciphers.WINDOW) and ids.max() < ciphers.VOCABULARY
    mends = ids[:, 1] == ciphers.MEND
    assert 0.4 < mends.float().mean() < 0.6
    hidden = (ids == ciphers.HIDE).sum(1)
    assert hidden[mends].eq(3).all() and hidden[~mends].eq(0).all()  # 35 % of 8 words
    given, wanted = ids[mends, 2 : 2 + ciphers.LENGTH], ids[mends, ciphers.BEGIN : -1]
    assert torch.equal(given[given != ciphers.HIDE], wanted[given != ciphers.HIDE])
    assert (ids[:, ciphers.BEGIN - 1] == ciphers.THEN).all() and (ids[:, -1] == ciphers.END).all()
    assert {*ciphers.examples(world, 50, seed=1, into=(2, 3))[:, 0].tolist()} == {2, 3}
    assert not (ids[~mends, 0] == ids[~mends, 1]).any()


class Oracle(nn.Module):
    """Says the next token of what it is given, but for some places."""

    def __init__(self, wrong: int | None) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        said = nn.functional.one_hot(input_ids.roll(-1, 1), ciphers.VOCABULARY).float()
        if self.wrong is not None:
            said[::2, self.wrong] = 0
        return SimpleNamespace(logits=said)


def test_an_answer_is_right_where_all_of_it_is():
    world = ciphers.World.of(0)
    assert {*ciphers.exact(Oracle(None), world, 10, 0).values()} == {1.0}
    assert {*ciphers.exact(Oracle(ciphers.BEGIN + 2), world, 10, 0).values()} == {0.5}
    assert {*ciphers.exact(Oracle(3), world, 10, 0).values()} == {1.0}  # of the question
