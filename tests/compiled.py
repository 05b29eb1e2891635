"""What becomes of a kernel on an H100, seen without one: `python tests/compiled.py` prints it as JSON.

Triton compiles for sm_90 with the assembler it brings. A process of its own, for where kernels are
interpreted they cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moecule.kernels import gemv, grouped, grouped_int8

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    "x8_ptr": "*i32", "d_ptr": "*fp32", "s_ptr": "*fp32", "x_ptr": "*fp32", "table_ptr": "*i64",
    "idx_ptr": "*i64", "coef_ptr": "*bf16", "y_ptr": "*fp32",
    "y8_ptr": "*i8", "yd_ptr": "*fp32", "ys_ptr": "*fp32",
}  # fmt: skip
GROUPED = {
    **POINTERS, "x_ptr": "*bf16", "sum_ptr": "*fp32", "given_ptr": "*i64", "tile_ptr": "*i32",
    "out_ptr": "*bf16",
}  # fmt: skip
INT8 = {**GROUPED, "x_ptr": "*i8", "d_ptr": "*fp32"}
EVEN = (
    "x_all",
    "d_all",
    "m",
    "columns",
    "run",
    "blocks",
)  # multiples of 16, as Triton sees of a layer's sizes


def built(
    kernel: Any, kinds: dict[str, str], fixed: dict[str, Any], warps: int, registers: int | None
) -> Path:
    """A kernel's machine code, in a file. kinds: of its pointers."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in fixed else kinds.get(n, "i32") for n in names}
    hints = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n in names
        if n not in fixed and (n in kinds or n in EVEN)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=hints)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": 3, "maxnreg": registers},
    )
    file = Path(tempfile.mkdtemp(), "kernel.cubin")
    file.write_bytes(made.asm["cubin"])
    return file


def said(tool: str, *given: str) -> str:
    """What one of the tools prints."""
    return subprocess.run([TOOLS / tool, *given], capture_output=True, text=True, check=True).stdout


def loops(listing: str) -> list[Counter[str]]:
    """Instructions of every loop's body, counted."""
    labels: dict[str, int] = {}
    steps: list[str] = []
    found = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(steps)
        elif step := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            steps.append(re.sub(r"^@!?U?P\w+\s+", "", step[1]))
            back = re.search(r"BRA.*?(\.L_\w+)", steps[-1])
            if back and back[1] in labels:
                found.append(Counter(s.split()[0] for s in steps[labels[back[1]] :]))
    return found


def report(
    kernel: Any,
    kinds: dict[str, str],
    fixed: dict[str, Any],
    warps: int,
    registers: int | None = None,
    step: float = 0,
) -> dict[str, Any]:
    """Registers, bytes of the stack, and for each loop that multiplies what it takes.

    step: weights that a lane unpacks each time around; 0: four for each dp4a.
    """
    file = built(kernel, kinds, fixed, warps, registers)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said("cuobjdump", "-res-usage", str(file)))
    assert usage is not None  # the tool says so of every kernel
    listing = said("nvdisasm", "-c", str(file))
    found, before = [], listing.split("ACQBULK")[0] if "ACQBULK" in listing else ""
    for body in loops(listing):
        dots = sum(n for name, n in body.items() if name.startswith("IDP.4A"))
        copies = sum(n for name, n in body.items() if name.startswith("LDGSTS"))
        if dots or step and copies:
            found.append({
                "instructions_a_weight": sum(body.values()) / (step or 4 * dots),
                "wide_loads": sum(n for s, n in body.items() if s.startswith("LDG") and "128" in s),
                "stores": sum(n for s, n in body.items() if s.startswith(("STS", "STL"))),
                "matrix_products": sum(n for s, n in body.items() if s.startswith(("HGMMA", "IGMMA"))),
            })  # fmt: skip
    early = len(re.findall(r"LDG", before))  # loads before the kernel's turn
    return {"registers": int(usage[1]), "stack": int(usage[2]), "loops": found, "early": early}


if __name__ == "__main__":
    layer = {"group": 128, "aligned": True}
    few = {"parts": 3, "leads": 2, "exact": False, "single": False, "early": 0, "chain": True}
    few |= {"known": True}
    held = few | {"gated": True, "to_parts": 3, "stages": 1, "hold": True, "rows": 64, "words": 128}
    few |= {"hold": False}
    up = few | {"rows": 64, "words": 64, "most": 128, "gated": True, "to_parts": 3, "stages": 2}
    down = few | {"rows": 8, "words": 512, "most": 512, "gated": False, "to_parts": 0, "stages": 1}
    out = {
        name: report(gemv._product_kernel, POINTERS, cut | layer, 4, gemv.REGISTERS)
        for name, cut in (("up", up), ("down", down))
    }
    cut = held | layer | {"most": 64}
    out["held"] = report(gemv._product_kernel, POINTERS, cut, 8, gemv.REGISTERS)
    many = {"widths": 1 << 3, "n": 4, "ahead": grouped.AHEAD, **layer}
    for tokens, (rows, warps, _) in grouped.CUTS.items():
        weights = rows * 32 * many["n"] / (32 * warps)
        cut = many | {"tokens": tokens, "rows": rows}
        out[f"{tokens}"] = report(grouped._grouped_kernel, GROUPED, cut, warps, step=weights)
    many = {"widths": 1 << 3, "n": 4, "near": grouped_int8.NEAR, **layer}
    for tokens, (rows, warps, _) in grouped_int8.CUTS.items():
        weights = rows * 32 * many["n"] / (32 * warps)
        cut, kernel = many | {"tokens": tokens, "rows": rows}, grouped_int8._product_kernel
        out[f"int8 {tokens}"] = report(kernel, INT8, cut, warps, step=weights)
    print(json.dumps(out))
