"""cloze: task files made of held-out text, which give a signal where a model is too small for benchmarks.

NAME_cloze asks, as LAMBADA does (arXiv:1606.06031), for the last word of a passage in which that word
has occurred before. NAME_next asks which of four stretches of the same text goes on from a passage.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecule.data import read_texts
from moecule.errors import DataError, OutputError, RecipeError
from moecule.files import write_text
from moecule.writer import check_out

WORDS = 60  # of a passage; its end is looked for in as many more
NEXT_WORDS = 12  # of a stretch that goes on
CHOICES = 4
LETTERS = 4  # of a word that is asked for, at least


@dataclass(frozen=True)
class Made:
    """Files, and how many items each has."""

    folder: Path
    items: Mapping[str, int]


def cloze(text: Sequence[str | Path], out: str | Path, *, items: int = 500, seed: int = 0) -> Made:
    """Write NAME_cloze.jsonl and NAME_next.jsonl into the folder `out` for each text NAME.

    Passages do not overlap. The same text and seed give the same bytes; warns where a text gives
    fewer than `items`. Raises DataError for text that gives none, OutputError where `out` holds
    other things.
    """
    if items < 1:
        raise RecipeError(f"{items} items were asked for; wanted 1 or more")
    out, files = Path(out), [Path(t) for t in text]
    names = [f.name.partition(".")[0] for f in files]
    if not files or len(set(names)) < len(names):
        raise DataError(
            "task files are named as their texts; give one or more, each of another name"
        )
    made: dict[str, list[dict[str, Any]]] = {}
    for name, file in zip(names, files, strict=True):
        found = _items(read_texts(file), items, random.Random(f"{seed} {name}"))
        for kind, of in found.items():
            if not of:
                raise DataError(f"{file} is too short to make a task of; give more text")
            made[f"{name}_{kind}"] = of
    few = [f"{name} {len(of)}" for name, of in made.items() if len(of) < items]
    if few:
        warnings.warn(f"the texts give fewer items than {items}: {', '.join(few)}", stacklevel=2)
    contents = {
        f"{name}.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in of)
        for name, of in made.items()
    }
    check_out(out, set(contents))
    for file_name, content in contents.items():
        there = out / file_name
        if there.exists() and there.read_bytes() != content.encode():
            raise OutputError(f"{there} holds another task; name another folder")
    for file_name, content in contents.items():
        write_text(out / file_name, content)
    return Made(out, {name: len(of) for name, of in made.items()})


@dataclass(frozen=True)
class _Words:
    """A document, and where its words lie."""

    text: str
    spans: tuple[tuple[int, int], ...]

    def between(self, first: int, last: int) -> str:
        """The text from a word to before another."""
        return self.text[self.spans[first][0] : self.spans[last - 1][1]]

    def goes_on(self, i: int) -> bool:
        """Whether one space lies before word i, and no question."""
        start, before = self.spans[i][0], self.spans[i - 1][1]
        return self.text[before:start] == " " and self.text[before - 1] != "?"

    def word(self, i: int) -> str:
        """The letters with which word i begins, where only signs follow them; else nothing."""
        first, last = self.spans[i]
        match = re.fullmatch(r"([^\W\d_]+)[\W_]*", self.text[first:last])
        return match[1] if match else ""


def _items(texts: Sequence[str], n: int, draw: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Up to n of each kind, a passage of each from a block of its own."""
    documents = [_Words(t, tuple(m.span() for m in re.finditer(r"\S+", t))) for t in texts]
    blocks = list(_blocks(documents))
    draw.shuffle(blocks)
    clozes: list[dict[str, Any]] = []
    passages: list[tuple[str, str]] = []
    for of, start in blocks:
        here = range(start + WORDS, start + 2 * WORDS - NEXT_WORDS)
        ends = [i for i in here if of.goes_on(i)]
        asked = [i for i in ends if _occurs(of, i)]
        if asked and len(clozes) < n:
            i = draw.choice(asked)
            clozes.append({"ctx": of.between(i - WORDS, i), "target": of.word(i)})
        if ends:
            i = draw.choice(ends)
            passages.append((of.between(i - WORDS, i), of.between(i, i + NEXT_WORDS)))
    return {"cloze": clozes, "next": _choices(passages, n, draw)}


def _blocks(documents: Sequence[_Words]) -> Iterator[tuple[_Words, int]]:
    for of in documents:
        for start in range(0, len(of.spans) - 2 * WORDS + 1, 2 * WORDS):
            yield of, start


def _occurs(of: _Words, i: int) -> bool:
    """Whether word i is long enough, and among those of the passage before it."""
    word = of.word(i)
    return len(word) >= LETTERS and any(of.word(j) == word for j in range(i - WORDS, i))


def _choices(
    passages: Sequence[tuple[str, str]], n: int, draw: random.Random
) -> list[dict[str, Any]]:
    """What goes on among what goes on elsewhere."""
    stretches = sorted({stretch for _, stretch in passages})
    if len(stretches) < CHOICES:
        return []
    out = []
    for passage, right in passages[:n]:
        drawn = draw.sample(stretches, CHOICES)
        wrong = [s for s in drawn if s != right][: CHOICES - 1]
        gold = draw.randrange(CHOICES)
        choices = [*wrong[:gold], right, *wrong[gold:]]
        out.append({"ctx": passage, "choices": choices, "gold": gold})
    return out
