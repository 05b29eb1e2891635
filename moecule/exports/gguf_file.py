"""GGUF, the file that llama.cpp runs: metadata, then tensors, each of one of ggml's types.

Names come from the gguf package's own map. Experts of a layer are one tensor a matrix, of one type:
layers may differ, experts of a layer may not.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from gguf.quants import quant_shape_to_byte_shape

from moecule.errors import PlanError, RecipeError, VerifyError
from moecule.exports.arch import Arch, add_settings, check_model
from moecule.exports.blocks import choose_type, decoded, encoded, fits, type_of
from moecule.exports.change import Change, Tally
from moecule.exports.contents import EXPERT, Contents, Weight
from moecule.exports.vocabulary import add_vocabulary
from moecule.files import writing

T = GGMLQuantizationType
ROUTERS = (MODEL_TENSOR.FFN_GATE_INP, MODEL_TENSOR.FFN_GATE_INP_SHEXP)
Types = Mapping[int, GGMLQuantizationType]  # {bits as moecule has them: type}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: one weight, or the experts of a layer."""

    name: str
    what: MODEL_TENSOR
    kind: GGMLQuantizationType
    weights: tuple[Weight, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is when unpacked."""
        each = self.weights[0].shape
        return (len(self.weights), *each) if self.stacked else each


def types_of(given: Sequence[str]) -> dict[int, GGMLQuantizationType]:
    """Of `TYPE`, for all that is rounded, and `BITS=TYPE`. Raises RecipeError for what is neither."""
    found: dict[int, GGMLQuantizationType] = {}
    for item in given:
        bits, equals, name = item.rpartition("=")
        if equals and not (bits.isdigit() and int(bits) in (*range(1, 9), 16)):
            raise RecipeError(
                f"--type {item}: {bits!r} is no width; wanted 1 to 8 or 16, as 4=Q4_1"
            )
        for width in (int(bits),) if equals else range(1, 9):
            found[width] = type_of(name)
    return found


def write(
    contents: Contents, file: Path, types: Types, tick: Callable[[], None]
) -> tuple[Change, ...]:
    """Write `file` and read it again; what became of the weights. `tick` is called for every layer.

    Raises PlanError for what llama.cpp does not run, CheckpointError for a tokenizer that GGUF does not
    hold, OutputError where there is no room, VerifyError where the file reads otherwise.
    """
    arch = check_model(contents)
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[arch.arch])
    numbers: Counter[str] = Counter()
    experts = channels = 0
    for entry in _entries(
        contents, arch, types
    ):  # names, shapes and types stand before all weights
        bytes_of = quant_shape_to_byte_shape(entry.shape, entry.kind)
        size = int(np.prod(bytes_of))
        writer.add_tensor_info(entry.name, bytes_of, np.dtype(np.uint8), size, entry.kind)
        numbers[entry.kind.name] += int(np.prod(entry.shape))
        if entry.what == MODEL_TENSOR.FFN_DOWN_EXP:
            experts, _, channels = entry.shape
    add_settings(writer, contents, arch, experts, channels)
    add_vocabulary(writer, contents.checkpoint.path, contents.settings.vocab_size)
    ((most, _),) = numbers.most_common(1)
    writer.add_file_type(_FILE_TYPES.get(most, LlamaFileType.GUESSED))
    tally, sums = Tally(), dict[str, tuple[str, int]]()
    with writing(file):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in _entries(contents, arch, types, tick):
            made = np.stack([_encoded(w, entry.kind, tally) for w in entry.weights])
            sums[entry.name] = (entry.kind.name, zlib.crc32(made.data))
            writer.write_tensor_data(made)
        writer.close()
    _check(file, sums)
    return tally.changes()


_FILE_TYPES = {t.name.removeprefix("MOSTLY_").removeprefix("ALL_"): t for t in LlamaFileType}


def _encoded(weight: Weight, kind: GGMLQuantizationType, tally: Tally) -> np.ndarray:
    flat = Weight(weight.dense()[None]) if len(weight.shape) == 1 else weight
    made = encoded(flat, kind)
    tally.add(weight.bits, kind.name, made.nbytes, flat.dense(), decoded(made, kind))
    return made


def _entries(
    contents: Contents, arch: Arch, types: Types, tick: Callable[[], None] = lambda: None
) -> Iterator[Entry]:
    """The tensors of the file, in its order."""
    names = get_tensor_name_map(arch.arch, contents.n_layers)
    for i in range(-1, contents.n_layers):
        part = contents.part(i)
        if i < 0:
            part = _with_head(part, contents, arch)
        stacks: dict[str, dict[int, Weight]] = {}
        for name, weight in part.items():
            if found := EXPERT.fullmatch(name):
                stack = f"{found['stack']}.{found['matrix']}.weight"
                stacks.setdefault(stack, {})[int(found["expert"])] = weight
            else:
                stacks[name] = {-1: _turned(name, weight, contents, arch)}
        for name, of in stacks.items():
            found_name = names.get_type_and_name(name, try_suffixes=(".weight", ".bias"))
            if found_name is None:
                raise PlanError(
                    f"{name} has no place in GGUF's {MODEL_ARCH_NAMES[arch.arch]}; export --to "
                    "transformers, and use llama.cpp's convert_hf_to_gguf.py on that"
                )
            what, made = found_name
            weights = tuple(of[e] for e in sorted(of))
            if what in ROUTERS or len(weights[0].shape) == 1:  # as llama.cpp's own script has them
                weights = tuple(Weight(w.dense().squeeze(0)) for w in weights)
                kind = T.F32
            else:
                kind = _kind(weights, types, name)
            yield Entry(made, what, kind, weights, -1 not in of)
        tick()


def _with_head(part: dict[str, Weight], contents: Contents, arch: Arch) -> dict[str, Weight]:
    """Some of llama.cpp's families have a head of their own even where it is the embedding."""
    if not getattr(contents.settings, "tie_word_embeddings", False):
        return part
    left = {n: w for n, w in part.items() if not n.endswith("lm_head.weight")}
    if arch.square:
        left["lm_head.weight"] = next(
            w for n, w in part.items() if n.endswith("embed_tokens.weight")
        )
    return left


def _turned(name: str, weight: Weight, contents: Contents, arch: Arch) -> Weight:
    """Rows of q and k as llama.cpp turns them: pairs of a head beside each other, not half a head apart."""
    settings = contents.settings
    heads = {
        "q_proj.weight": settings.num_attention_heads,
        "k_proj.weight": settings.num_key_value_heads,
    }.get(".".join(name.rsplit(".", 2)[-2:]))
    if not arch.interleaved or heads is None:
        return weight
    at = torch.arange(weight.shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()
    return weight.rows(at)


def _kind(weights: Sequence[Weight], types: Types, name: str) -> GGMLQuantizationType:
    """The type asked for, where rows are whole blocks of it; else what keeps the codes."""
    bits, columns = sorted({w.bits for w in weights}), weights[0].shape[-1]
    asked = {types.get(b) for b in bits}
    if len(bits) > 1 and (None in asked or len(asked) > 1):
        raise PlanError(
            f"{name} has experts of {', '.join(map(str, bits))} bits, and GGUF gives a layer's experts "
            "one type; compress with one width a layer (--recipe uniform or bsp), or store all alike, "
            "larger: --type Q4_1"
        )
    (kind, *_) = asked
    return kind if kind is not None and fits(kind, columns) else choose_type(weights)


def _check(file: Path, sums: Mapping[str, tuple[str, int]]) -> None:
    """Raise VerifyError where the file, read again, holds something else."""
    found = {
        t.name: (t.tensor_type.name, zlib.crc32(np.ascontiguousarray(t.data).data))
        for t in GGUFReader(file).tensors
    }
    if found != dict(sums):
        wrong = next(n for n in {**sums, **found} if found.get(n) != sums.get(n))
        raise VerifyError(
            f"{file}: {wrong} reads otherwise than it was written; is the disk sound?"
        )
