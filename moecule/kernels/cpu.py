"""Products with packed weights on a CPU, by C that is compiled on the machine the first time it runs."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from moecule.packed import Packed

HERE = Path(__file__).parent
SOURCES = ("cpu.c", "rows.h", "int8.h")
# no contraction: a weight is rounded after each step, as in packed.affine
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off")
FORMS = {"plain": 0, "avx2": 1, "avx512": 2}
FEW = 16  # tokens up to which reading codes anew for every four of them is faster than unpacking
BLOCK_BYTES = 2**22  # of unpacked rows, which stay in the cache for the product


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, made if it is not there yet; None, once with a warning, where it cannot be."""
    try:
        made = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as e:
        said = getattr(e, "stderr", None) or str(e)
        warnings.warn(
            "packed weights run by plain torch, slowly: the C kernel cannot be compiled "
            f"({' '.join(said.split())[-200:]}); install a C compiler, or name one in CC",
            stacklevel=2,
        )
        return None
    at, number = ctypes.c_void_p, ctypes.c_int64
    made.multiply.argtypes = (at, number, number, number, ctypes.c_int)
    made.multiply_fast.argtypes = (at, number, number, number)
    made.dequantize.argtypes = (at, number, number, at, ctypes.c_int)
    made.multiply.restype = made.dequantize.restype = None
    return made


def _compiled() -> Path:
    """The library's file in the user's cache; its name says what it was made of."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("there is none of cc, gcc and clang")
    made_of = hashlib.sha256(" ".join((compiler, *FLAGS)).encode())
    for name in SOURCES:
        made_of.update((HERE / name).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecule"
    file = cache / f"cpu-{made_of.hexdigest()[:16]}.so"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # two processes may both be at it
            made = Path(scratch) / file.name
            command = [compiler, *FLAGS, str(HERE / "cpu.c"), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, file)
    return file


def _kernel(form: str | None) -> tuple[ctypes.CDLL, int]:
    """The compiled code, and the number of a form: of FORMS, or for None the best there is."""
    found = library()
    assert found is not None  # asked only where there is one
    return found, found.best() if form is None else FORMS[form]


def best() -> str:
    """The form that this processor has the instructions for."""
    _, which = _kernel(None)
    return next(name for name, number in FORMS.items() if number == which)


@dataclass(frozen=True)
class Job:
    """A weight as the kernel knows it: where its tensors lie. They must outlive it."""

    codes: int
    scale: int
    zero: int  # 0: there is none
    bits: int
    group: int

    @staticmethod
    def of(weight: Packed) -> Job:
        """Of one matrix, contiguous, on the CPU."""
        zero = 0 if weight.zero is None else weight.zero.data_ptr()
        codes, scale = weight.codes.data_ptr(), weight.scale.data_ptr()
        return Job(codes, scale, zero, weight.bits, weight.group)


def multiply(
    jobs: Sequence[Job],
    x: Float32[Tensor, "T N"],
    counts: Sequence[int],
    rows: int,
    *,
    exact: bool = True,
    form: str | None = None,
) -> Float32[Tensor, "T M"]:
    """Rows of x times weights [rows, N]: the first counts[0] of them by jobs[0], and so on.

    `exact`: in float32. Otherwise x is rounded to int8, 32 columns to a scale, where the processor has
    AVX-512 VNNI and groups are powers of two from 32 on. `form`: of FORMS, else the best there is.
    What comes out does not depend on the number of threads.
    """
    found, which = _kernel(form)
    x = x.contiguous()
    y = x.new_zeros(x.shape[0], rows)
    at_x, at_y, table = x.data_ptr(), y.data_ptr(), []
    for j, n in zip(jobs, counts, strict=True):
        table.append([j.codes, j.scale, j.zero, j.bits, j.group, at_x, at_y, n])
        at_x, at_y = at_x + 4 * n * x.shape[1], at_y + 4 * n * rows
    listed = torch.tensor(table, dtype=torch.int64)
    asked = (listed.data_ptr(), len(table), rows, x.shape[1])
    if exact or not found.multiply_fast(*asked):
        found.multiply(*asked, which)
    return y


def linear(
    x: Float32[Tensor, "T N"], weight: Packed, *, exact: bool = True
) -> Float32[Tensor, "T M"]:
    """x times one weight: by the codes for few tokens, else a block of rows unpacked at a time."""
    rows, columns = weight.codes.shape[0], weight.columns
    if len(x) <= FEW:
        return multiply([Job.of(weight)], x, [len(x)], rows, exact=exact)
    step = max(1, BLOCK_BYTES // (4 * columns))
    starts = range(0, rows, step)
    return torch.cat([x @ dequantize(_part(weight, r, r + step)).T for r in starts], 1)


def _part(weight: Packed, first: int, last: int) -> Packed:
    zero = None if weight.zero is None else weight.zero[first:last]
    return replace(
        weight, codes=weight.codes[first:last], scale=weight.scale[first:last], zero=zero
    )


def dequantize(weight: Packed, form: str | None = None) -> Float32[Tensor, "M N"]:
    """The weights of one matrix, bit for bit what `Packed.dequantize` gives in float32."""
    found, which = _kernel(form)
    rows, job = weight.codes.shape[0], Job.of(weight)
    out = torch.empty(rows, weight.columns)
    described = torch.tensor([job.codes, job.scale, job.zero, job.bits, job.group])
    found.dequantize(described.data_ptr(), rows, weight.columns, out.data_ptr(), which)
    return out
