"""Ctrl-C on the command line: one line that says whether the same command goes on."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from moecule.errors import InterruptError

JOURNALLED = ("calibrate", "apply", "compress", "heal", "slim", "train", "learn")


class Verbs(TyperGroup):
    """The verbs; what Ctrl-C raises within one becomes an InterruptError."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as e:
            more = "; run the same command to go on" if ctx.invoked_subcommand in JOURNALLED else ""
            raise InterruptError(f"interrupted{more}") from e
