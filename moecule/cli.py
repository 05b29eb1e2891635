"""The command line: its verbs, which making.py, teaching.py and looking.py hold, and how it ends."""

from __future__ import annotations

import os
import sys
import warnings

import typer

from moecule import looking, making, teaching
from moecule.complete import COMPLETE
from moecule.errors import MoeculeError
from moecule.interrupt import Verbs
from moecule.options import hushable
from moecule.show import complain, err_console, out_console, say

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Make Mixture-of-Experts models small, with proof of what it cost.",
)
VERBS = (  # as --help lists them
    *(looking.inspect, looking.families, looking.methods, looking.recipes),
    *(making.calibrate, making.plan, making.apply, making.compress, making.export),
    *(making.cloze, looking.evaluate, looking.report, looking.compare),
    *(teaching.heal, teaching.slim, teaching.learn, teaching.train),
    *(making.aggregate, making.patterns, looking.generate),
)
for _verb in VERBS:
    app.command()(hushable(_verb))


FIRST = (  # work as they stand, without a model or a network; tests run them
    ("moecule inspect embedded", "what the small model that comes with moecule holds"),
    ("moecule compress embedded -o out --bits 2.5", "make it small, and measure what that costs"),
    ("moecule generate out 'The president said that'", "let the result speak"),
)


def welcome() -> None:
    """What `moecule` alone says."""
    width = max(len(command) for command, _ in FIRST)
    say("Make Mixture-of-Experts models small, with proof of what it cost. Try, one by one:\n")
    for command, what in FIRST:
        say(f"  {command:{width}}   {what}")
    say(
        "\nA model of yours is a folder, or the id of one in the Hub's cache, in place of embedded.\n"
        "moecule recipes and moecule methods list what can be done; moecule --help, all commands;\n"
        "moecule COMMAND --help, one; moecule --install-completion completes names in your shell."
    )


def main() -> None:
    """Run a verb; a user's mistake is one line and exit code 2."""
    warnings.showwarning = lambda message, *args, **kwargs: complain("warning", message, "yellow")
    if os.environ.get("RANK", "0") != "0":  # one of several processes tells the story
        out_console.quiet, err_console.quiet = True, True
    if len(sys.argv) == 1 and COMPLETE not in os.environ:
        welcome()
        return
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
