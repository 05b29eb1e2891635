"""The command line: its verbs, which making.py and looking.py hold, and how it ends."""

from __future__ import annotations

import os
import sys
import warnings

import typer

from moecule import looking, making
from moecule.errors import MoeculeError
from moecule.interrupt import Verbs
from moecule.show import complain, err_console, out_console

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Make Mixture-of-Experts models small, with proof of what it cost.",
)
VERBS = (  # as --help lists them
    *(looking.inspect, looking.families, looking.methods),
    *(making.calibrate, making.plan, making.apply, making.compress),
    *(looking.evaluate, looking.report, looking.compare, making.patterns, looking.generate),
)
for _verb in VERBS:
    app.command()(_verb)


def main() -> None:
    """Run a verb; a user's mistake is one line and exit code 2."""
    warnings.showwarning = lambda message, *args, **kwargs: complain("warning", message, "yellow")
    if os.environ.get("RANK", "0") != "0":  # one of several processes tells the story
        out_console.quiet, err_console.quiet = True, True
    try:
        app()
        if "torch" in sys.modules:
            _leave()
    except MoeculeError as e:
        complain("moecule", e, "red")
        sys.exit(e.code)
    except OSError as e:
        complain("moecule", f"{e.filename}: {e.strerror}" if e.filename else e, "red")
        sys.exit(2)


def _leave() -> None:
    from moecule.ranks import leave

    leave()
