"""A byte-level BPE tokenizer as GGUF metadata: tokens, their kinds, merges, and how text is split first.

llama.cpp knows ways of splitting text by name; a tokenizer.json has the regular expression itself.
Names are those of llama.cpp's src/llama-vocab.cpp, where the same expressions stand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from moecule.errors import CheckpointError
from moecule.files import parse_json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # the expression of a Split before ByteLevel: llama.cpp's name
    _CONTRACTIONS + r"\p{N}" + _ENDS: "qwen2",
    _CONTRACTIONS + r"\p{N}{1,3}" + _ENDS: "llama-bpe",
}
OWN_SPLIT = "gpt-2"  # the expression that ByteLevel itself has


def add_vocabulary(writer: GGUFWriter, folder: Path, size: int) -> None:
    """The tokenizer beside a model of `size` tokens, into the file's metadata.

    Raises CheckpointError for one that is not byte-level BPE, or splits text in a way llama.cpp has no
    name for.
    """
    file = folder / "tokenizer.json"
    try:
        said = parse_json(file.read_text(encoding="utf-8"))
        tokens, kinds = _tokens(said, size)
        split = _split(said)
        special = SpecialVocab(folder, load_merges=True, n_vocab=size)
    except FileNotFoundError as e:
        raise CheckpointError(f"{folder} has no tokenizer.json; {_INSTEAD}") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged ({e!r}); fetch it again") from e
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # no merges is no array to GGUF, and llama.cpp wants one
    special.merges = special.merges or [f"{tokens[-1]} {tokens[-1]}"]
    for first in ("bos", "eos"):
        special.add_special_token.setdefault(first, False)
    special.add_to_gguf(writer, quiet=True)


_INSTEAD = (
    "GGUF is written for byte-level BPE tokenizers; export --to transformers, and use llama.cpp's "
    "convert_hf_to_gguf.py on that"
)


def _tokens(said: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every id's token and kind; ids without one are unused."""
    if said["model"]["type"] != "BPE" or said["model"].get("byte_fallback"):
        raise CheckpointError(f"the tokenizer is {said['model']['type']} over text; {_INSTEAD}")
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    for token, i in said["model"]["vocab"].items():
        tokens[i], kinds[i] = token, int(TokenType.NORMAL)
    for added in said.get("added_tokens") or ():
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    return tokens, kinds


def _split(said: dict[str, Any]) -> str:
    """llama.cpp's name for how text is split before merging."""
    normalizer, before = said.get("normalizer"), said.get("pre_tokenizer") or {}
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp leaves text as it is
        raise CheckpointError(f"the tokenizer's normalizer is {normalizer['type']}; {_INSTEAD}")
    steps = before.get("pretokenizers", [before] if before else [])
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        own = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own:
            return OWN_SPLIT
        if kinds == ["Split", "ByteLevel"] and not own:
            expression = steps[0]["pattern"].get("Regex")
            if steps[0].get("behavior") == "Isolated" and expression in SPLITS:
                return SPLITS[expression]
    raise CheckpointError(
        f"llama.cpp has no name known here for how the tokenizer splits text "
        f"({json.dumps(steps)[:80]}); {_INSTEAD}"
    )
