"""What can go wrong that is the user's to mend, as a tree.

    ValueError
      MoeculeError          one line: what was found, what was wanted, what to do
        CheckpointError     the model folder or its files
        PlanError           the plan, or a plan and a model that do not belong together
        RecipeError         a recipe file, a budget, an option
        DataError           calibration or evaluation text
        OutputError         where the result should go
        VerifyError         what was written does not compute what it should
        InterruptError      Ctrl-C

The command line prints the line and exits with 2, after Ctrl-C with 130. Anything else that is
raised is a bug.
"""

from __future__ import annotations


class MoeculeError(ValueError):
    """A mistake that the user can mend; the message is one line, whatever is quoted in it."""

    code = 2  # of the process

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class CheckpointError(MoeculeError):
    """The checkpoint cannot be read, or is of a kind that is not served."""


class PlanError(MoeculeError):
    """The plan is not well formed, or belongs to another model."""


class RecipeError(MoeculeError):
    """The recipe asks for something that does not exist or cannot be had."""


class DataError(MoeculeError):
    """The text cannot be read, or holds too little."""


class OutputError(MoeculeError):
    """The output folder cannot take the result."""


class VerifyError(MoeculeError):
    """A written checkpoint, opened afresh, computes something else."""


class InterruptError(MoeculeError):
    """The user has stopped the command."""

    code = 130
