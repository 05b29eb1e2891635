"""What of moecule imports and runs as on Windows and on macOS, seen from Linux: prints it as JSON.

Of the standard library what Windows lacks is gone, and sys.platform says another system; libraries, which
have builds of their own there, are imported before.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import pkgutil
import sys
import types
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

GONE = ("fcntl", "grp", "pwd", "resource", "termios", "triton", "tty")
EXTRAS = (
    "compressed_tensors",
    "datasets",
    "gguf",
    "llama_cpp",
    "lm_eval",
    "vllm",
)  # which modules may need that are not there
NOT_IN_OS = ("fork", "getuid", "posix_fadvise", "register_at_fork", "sched_getaffinity")


class Nowhere(MetaPathFinder):
    """Finds that there are no such modules."""

    def find_spec(self, name: str, *args: Any) -> None:
        """Refuse those of GONE."""
        if name.partition(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def import_libraries() -> None:
    """All that modules of moecule import at their top and that is none of them."""
    root = Path(__file__).parents[1] / "moecule"
    for file in sorted(root.rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if names and names[0].partition(".")[0] not in ("moecule", "__future__", *GONE):
                with contextlib.suppress(ModuleNotFoundError):  # of an extra
                    exec(compile(ast.Module([node], []), str(file), "exec"), {})


def leave() -> list[tuple[int, int, int]]:
    """From here on this is Windows; what msvcrt is asked for."""
    asked: list[tuple[int, int, int]] = []
    for name in [n for n in sys.modules if n.partition(".")[0] in GONE]:
        del sys.modules[name]
    sys.meta_path.insert(0, Nowhere())
    for name in NOT_IN_OS:
        if hasattr(os, name):
            delattr(os, name)
    msvcrt = types.ModuleType("msvcrt")
    msvcrt.LK_NBLCK = 2  # type: ignore[attr-defined]
    msvcrt.locking = lambda *args: asked.append(args)  # type: ignore[attr-defined]
    sys.modules["msvcrt"] = msvcrt
    sys.platform = "win32"
    return asked


def main(folder: Path) -> dict[str, Any]:
    """What was found."""
    import_libraries()
    asked = leave()
    import moecule

    needs_triton = []
    for found in pkgutil.walk_packages(moecule.__path__, "moecule."):
        if found.name == "moecule.__main__":
            continue
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as e:
            assert e.name in ("triton", *EXTRAS), e
            if e.name == "triton":
                needs_triton.append(found.name)
    from moecule.journal import only_one
    from moecule.states import free_host_bytes, give_back

    give_back()
    with only_one(folder / "out"):
        held = sorted(p.name for p in folder.iterdir())
    left = sorted(p.name for p in folder.iterdir())
    sys.platform = "darwin"
    give_back()
    free = free_host_bytes()
    return {
        "needs_triton": needs_triton, "locks": len(asked), "held": held, "left": left, "free": free,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
