"""Make the embedded tokenizer, the training tokens, and the calibration and evaluation texts.

The source is a file of JSON lines `[domain, source, text]`, each text a piece of at most some
6000 characters cut from a book or a source file. The pieces are split into training and held-out
with a fixed seed; what repeats in a held-out piece is then taken out of the training pieces.

    python experiments/embedded/prepare.py SOURCE.jsonl.xz TOKENS.bin
"""

import argparse
import json
import lzma
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END = "<|endoftext|>"
BYTES_PER_DOMAIN = 100_000  # of evaluation text, and as much again of calibration text
LONGEST_TEXT = 8_000  # bytes of one calibration text
SHARED_RUN = 13  # words in a row: a training paragraph that shares so many is a copy
# Bytes of UTF-8 read as Latin-1 leave C1 control characters; such pieces are bad scans.
MISREAD = re.compile("[\x80-\x9f]")


@dataclass(frozen=True)
class Piece:
    domain: str
    source: str
    text: str


def read_pieces(path: Path) -> list[Piece]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        pieces = [Piece(*json.loads(line)) for line in lines]
    return [piece for piece in pieces if not MISREAD.search(piece.text)]


def take_turns(pieces: list[Piece], limit: int) -> tuple[list[Piece], list[Piece]]:
    """Take about `limit` bytes a domain, its sources in turn; return (taken, rest).

    In turn, because by chance alone one large source would fill a domain's share.
    """
    queues: dict[str, dict[str, list[Piece]]] = defaultdict(lambda: defaultdict(list))
    for piece in pieces:
        queues[piece.domain][piece.source].append(piece)
    taken = []
    for sources in queues.values():
        size = 0
        while size < limit:
            for queue in sources.values():
                if queue and size < limit:
                    taken.append(queue.pop())
                    size += len(taken[-1].text.encode())
    chosen = {id(piece) for piece in taken}
    return taken, [piece for piece in pieces if id(piece) not in chosen]


def runs(text: str) -> Iterator[int]:
    words = re.findall(r"\w+", text.lower())
    for i in range(len(words) - SHARED_RUN + 1):
        yield hash(tuple(words[i : i + SHARED_RUN]))


def without_copies(pieces: list[Piece], held_out: list[Piece]) -> list[Piece]:
    """Drop the paragraphs that share a run of words with a held-out piece.

    A dictionary repeats its gloss at every synonym, and code repeats itself from file to file.
    """
    seen = {run for piece in held_out for run in runs(piece.text)}
    kept = []
    for piece in pieces:
        paragraphs = piece.text.split("\n\n")
        text = "\n\n".join(p for p in paragraphs if seen.isdisjoint(runs(p)))
        if text.strip():
            kept.append(Piece(piece.domain, piece.source, text))
    return kept


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)


def cut(text: str, limit: int) -> str:
    return text.encode()[:limit].decode(errors="ignore")


def write_texts(folder: Path, calibration: list[Piece], held_out: list[Piece]) -> None:
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps([piece.domain, cut(piece.text, LONGEST_TEXT)], ensure_ascii=False) + "\n"
        for piece in calibration
    ]
    (folder / "calibration.jsonl").write_text("".join(lines), encoding="utf-8")
    for domain in sorted({piece.domain for piece in held_out}):
        text = "\n\n".join(piece.text for piece in held_out if piece.domain == domain)
        (folder / "eval" / f"{domain}.txt").write_text(
            cut(text, BYTES_PER_DOMAIN).rstrip() + "\n", encoding="utf-8"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the texts: JSON lines, xz")
    parser.add_argument("tokens", type=Path, help="where the uint16 training tokens go")
    parser.add_argument("--assets", type=Path, default=Path("moecule/assets"))
    args = parser.parse_args()

    pieces = read_pieces(args.source)
    random.Random(0).shuffle(pieces)
    held_out, rest = take_turns(pieces, BYTES_PER_DOMAIN)
    training = without_copies(rest, held_out)
    calibration, _ = take_turns(training, BYTES_PER_DOMAIN)
    random.Random(1).shuffle(calibration)
    write_texts(args.assets / "text", calibration, held_out)

    texts = [piece.text for piece in training]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(args.assets / "model")
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    end = tokenizer.eos_token_id
    tokens = np.concatenate([np.array([end, *e.ids], dtype=np.uint16) for e in encoded])
    args.tokens.parent.mkdir(parents=True, exist_ok=True)
    tokens.tofile(args.tokens)

    size = sum(len(text.encode()) for text in texts)
    dropped = sum(len(piece.text.encode()) for piece in rest) - size
    print(f"{len(training)} training pieces, {size / 1e6:.1f} MB, {dropped / 1e6:.2f} MB dropped")
    print(f"{len(held_out)} held-out pieces, {len(calibration)} for calibration")
    print(f"{len(tokens) / 1e6:.2f}M tokens, {size / len(tokens):.2f} bytes each")


if __name__ == "__main__":
    main()
