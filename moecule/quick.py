"""What the command answers before the package, and with it torch, is imported: in a fraction of a second.

A shell that completes a line waits for every key; `moecule` alone and --help are what a newcomer tries
first. Python imports a package before any module in it, so this is the first thing that it imports.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from moecule.complete import COMPLETE


def is_quick(argv: list[str], started: list[str], asked: bool) -> bool:
    """Whether the process is the command, and needs no model.

    `argv`: as sys.argv; `started`: as sys.orig_argv; `asked`: whether a shell wants completions.
    """
    command = Path(argv[0]).stem == "moecule" or (argv[0] == "-m" and "moecule" in started)
    return command and (asked or len(argv) == 1 or "--help" in argv[1:])


if is_quick(sys.argv, sys.orig_argv, COMPLETE in os.environ):
    if sys.argv[0] == "-m":
        sys.argv[0] = "moecule"
    from moecule.cli import main

    main()
    sys.exit(0)
