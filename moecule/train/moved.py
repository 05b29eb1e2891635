"""What training has moved, as it is stored, and the checkpoint with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moecule.checkpoint import INDEX, Checkpoint
from moecule.files import save_whole, writing
from moecule.folder import copy_into, side_files
from moecule.hf import Streamed, skeleton
from moecule.train.low_rank import merged, updates
from moecule.train.shards import whole
from moecule.train.student import Student
from moecule.train.thaw import frozen, thawed_names


def changes(student: Student) -> dict[str, Tensor]:
    """What may have moved, by its names on disk and as stored there; of all processes, for the first.

    All processes must call it.
    """
    adapted = updates(student.model)
    thawed, first = thawed_names(student.model), student.compute.ranks.is_first
    moved: dict[str, Tensor] = {}
    for name, parameter in student.model.named_parameters(remove_duplicate=False):
        tensor = whole(parameter.detach())  # of all processes
        if name in adapted:
            tensor = merged(adapted[name], tensor)
        if first:
            moved[name] = frozen(tensor.cpu()) if name in thawed else tensor.cpu()
    return _to_disk(student, moved) if first else {}


def _to_disk(student: Student, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    known = student.checkpoint.tensors
    if student.packed:
        return {n: t.to(known[n].dtype) for n, t in moved.items() if n in known}
    net, cpu = skeleton(student.checkpoint, torch.float32)[0], torch.device("cpu")
    streamed = Streamed(
        student.checkpoint, student.family, net, cpu, dict(student.disk), dict(student.dtypes)
    )
    made = streamed.to_disk({n: t for n, t in moved.items() if n in student.disk})
    return {n: t for n, t in made.items() if n in known}


def stored_as(student: Student, prefix: str = "") -> dict[str, torch.dtype]:
    """{name: dtype on disk} of floats whose names begin so, without that. Scales are rounded already."""
    return {
        name.removeprefix(prefix): dtype
        for name, dtype in student.dtypes.items()
        if name.startswith(prefix) and dtype.is_floating_point
    }


def write_changed(checkpoint: Checkpoint, moved: Mapping[str, Tensor], folder: Path) -> None:
    """The checkpoint with other values for some tensors, into `folder`; config, tokenizer and plan too.

    Weights that lie there in another form are left behind, for they have not moved.
    Raises OutputError where there is no room.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in sorted({info.file for info in checkpoint.stored.values()}):
        with safe_open(checkpoint.path / name, "pt") as f:
            tensors = {n: moved[n] if n in moved else f.get_tensor(n) for n in list(f.keys())}
        save_whole({n: t.contiguous() for n, t in tensors.items()}, folder / name)
    source = checkpoint.path
    names = ["config.json", INDEX, "plan.yaml", "plan.channels"]
    if (source / "plan.yaml").is_file():  # what README.md says is ours, too
        names.append("README.md")
    named = [source / n for n in names if (source / n).is_file()]
    copy_into(folder, [*side_files(source), *sorted(source.glob("*.py")), *named])


class Shelf(Mapping[str, Tensor]):
    """Tensors of a folder's files, read when they are asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    @staticmethod
    def of(folder: Path) -> Shelf:
        """All of its safetensors files."""
        files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as f:
                files |= dict.fromkeys(f.keys(), file)
        return Shelf(files)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as f:
            found: Tensor = f.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
