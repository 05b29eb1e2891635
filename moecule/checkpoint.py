"""A checkpoint on disk.

Opening reads headers only. A quantised source is shown as what it would be in bf16 (`decode.py`), and
decoded as it is read. Pickled weights are refused: they run code when opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moecule.decode import (
    DECODED,
    DTYPES,
    QUANTISED,
    TensorInfo,
    decode,
    decoded_view,
    scheme_of,
)
from moecule.errors import CheckpointError
from moecule.files import parse_json

INDEX = "model.safetensors.index.json"
MOST_HEADER = 10**8  # bytes; safetensors has no larger ones


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder."""

    name: str  # as the user gave it
    path: Path
    config: Mapping[str, Any]  # config.json as it is on disk, but for how a source is quantised
    tensors: Mapping[str, TensorInfo]  # decoded
    stored: Mapping[str, TensorInfo]  # as they are on disk
    digest: str  # 16 hex digits: config, headers, and a sample of every shard's bytes

    @staticmethod
    def open(model: str | Path) -> Checkpoint:
        """Open a folder, or a Hub id that lies in the user's cache.

        Raises CheckpointError where there is none, a file is missing, cut short or pickled, or it
        is quantised in a way that is not decoded here.
        """
        path = _folder(str(model))
        config = _config(path)
        scheme = scheme_of(config, str(path))
        stored: dict[str, TensorInfo] = {}
        total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for file in _shards(path):
            header, sample = _header(path / file)
            total.update(json.dumps(header, sort_keys=True).encode() + sample)
            for name, info in header.items():
                if name != "__metadata__":
                    if info["dtype"] not in DTYPES:
                        raise CheckpointError(
                            f"{path / file}: {name} is {info['dtype']}, which is not decoded here "
                            f"({DECODED} are); use the model's bf16 checkpoint"
                        )
                    stored[name] = TensorInfo(file, DTYPES[info["dtype"]], tuple(info["shape"]))
                    start, end = info["data_offsets"]
                    if math.prod(info["shape"]) * stored[name].dtype.itemsize != end - start:
                        raise CheckpointError(
                            f"{path / file}: {name} is {stored[name]} and has {end - start} bytes; "
                            "fetch it again"
                        )
        if scheme is not None:
            config.pop(QUANTISED)
        tensors = decoded_view(stored, scheme, str(path))
        return Checkpoint(str(model), path, config, tensors, stored, total.hexdigest()[:16])

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The tensors `names`, decoded, on the CPU. Raises CheckpointError where one cannot be read."""
        out: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for name in names:  # one by one: not all codes need be in memory besides what they make
                found = {n: self._stored(n, files, stack) for n in self._parts(name)}
                out[name] = self._decoded(name, found, None)
        return out

    def read_parts(self, names: list[str]) -> dict[str, Tensor]:
        """What makes the tensors `names`, by its own names, as it is on disk; for `decoded`.

        Raises CheckpointError where one cannot be read.
        """
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            return {n: self._stored(n, files, stack) for name in names for n in self._parts(name)}

    def decoded(
        self, names: list[str], parts: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, Tensor]:
        """The tensors `names`: what is coded is sent to `device` and decoded there, all else left.

        Raises CheckpointError where a scale is NaN or Inf.
        """
        return {name: self._decoded(name, parts, device) for name in names}

    def _parts(self, name: str) -> tuple[str, ...]:
        coded = self.tensors[name].coded
        return (name,) if coded is None else (coded.codes, coded.scale)

    def _decoded(
        self, name: str, parts: Mapping[str, Tensor], device: torch.device | None
    ) -> Tensor:
        info = self.tensors[name]
        return decode(info, parts, str(self.path), device) if info.coded else parts[name]

    def _stored(self, name: str, files: dict[str, Any], stack: ExitStack) -> Tensor:
        """A tensor as it is on disk; `files` are those open, which `stack` closes."""
        file = self.stored[name].file
        try:
            if file not in files:
                files[file] = stack.enter_context(safe_open(self.path / file, "pt"))
            tensor: Tensor = files[file].get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{self.path / file} cannot be read: {e}; fetch it again") from e
        return tensor

    @property
    def is_coded(self) -> bool:
        """Whether tensors are decoded as they are read."""
        return any(t.coded for t in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(t.size_bytes for t in self.stored.values())


def _folder(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if not path.exists() and model.count("/") <= 1 and not model.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as e:
            raise CheckpointError(
                f"{model!r} is no folder here and no model in the Hub cache; give a folder, "
                f"or fetch it first: hf download {model}"
            ) from e
    raise CheckpointError(
        f"{model}: found {'a file' if path.exists() else 'nothing'}, wanted a model folder"
    )


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} is no checkpoint: it has no config.json; give a model folder"
        )
    try:
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file} is not JSON ({e}); fetch it again") from e
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{file} names no model_type, so the family is unknown; fetch it again"
        )
    for key in ("quantization_config", "moecule"):
        if config.get(key) is None:  # as if it were not there
            config.pop(key, None)
        elif not isinstance(config[key], dict):
            raise CheckpointError(
                f"{file}: {key} is {config[key]!r}, wanted a table; fetch it again"
            )
    return config


def _shards(path: Path) -> list[str]:
    index = path / INDEX
    if index.is_file():
        try:
            files = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
            outside = [f for f in files if not _is_inside(f)]
            missing = [f for f in files if not (path / f).is_file()] if not outside else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{index} is damaged ({e!r}); fetch it again") from e
        if outside or not files:
            named = repr(outside[0]) if outside else "no file"
            raise CheckpointError(
                f"{index} names {named}, wanted files in its folder; fetch it again"
            )
        if missing:
            raise CheckpointError(
                f"{index} names {', '.join(missing)}, not in {path}; fetch what is missing"
            )
        return files
    files = sorted(p.name for p in path.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise CheckpointError(
            f"{path} has pickled weights only ({pickled[0]}), which run code when opened; "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{path} has a config.json and no *.safetensors; fetch the weights")


def _is_inside(name: str) -> bool:
    """Whether it names a shard that lies in the folder."""
    parts = PurePosixPath(name).parts
    return ".." not in parts and not name.startswith("/")


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and some bytes out of its middle."""
    try:
        with file.open("rb") as f:
            size, length = file.stat().st_size, struct.unpack("<Q", f.read(8).ljust(8, b"\0"))[0]
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file} is cut short or no safetensors file; fetch it again")
            header, end = _parsed(f.read(min(length, MOST_HEADER)), file)
            if size != 8 + length + end:
                raise CheckpointError(
                    f"{file} has {size} bytes and its header wants {8 + length + end}; fetch it again"
                )
            f.seek(8 + length + max(0, end // 2 - 2**15))
            return header, f.read(2**16)
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read: {e}; fetch it again") from e


def _parsed(raw: bytes, file: Path) -> tuple[dict[str, Any], int]:
    """(the header, where the last tensor ends). Raises CheckpointError for gaps and overlaps too."""
    try:
        header = parse_json(raw)
        entries = [t for n, t in header.items() if n != "__metadata__"]
    except (ValueError, AttributeError) as e:
        raise CheckpointError(f"{file}: its header is damaged; fetch it again") from e
    if not all(map(_is_entry, entries)):
        raise CheckpointError(f"{file}: its header is damaged; fetch it again")
    end = 0
    for start, stop in sorted(t["data_offsets"] for t in entries):
        if not start == end <= stop:
            raise CheckpointError(
                f"{file}: its tensors do not lie one after another; fetch it again"
            )
        end = stop
    return header, end


def _is_entry(entry: Any) -> bool:
    """Whether it says of a tensor what it must: dtype, shape, and where its bytes begin and end."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(n) is int and 0 <= n < 2**63 for n in shape + offsets)
