"""Make Mixture-of-Experts language models small, with proof of what it cost.

Importing this package registers its checkpoints with transformers:

    import moecule
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("out")
"""

from moecule import quick as _quick  # noqa: F401  ends here where no more is needed
from moecule import runtime as _runtime  # noqa: F401  registers
from moecule.aggregate import Aggregated, aggregate
from moecule.cloze import cloze
from moecule.compare import compare
from moecule.compress import Compressed, compress
from moecule.errors import MoeculeError
from moecule.evaluate import evaluate
from moecule.export import Exported, export
from moecule.generate import Generated, generate
from moecule.inspect import Inspection, inspect
from moecule.load import ExpertLoad, expert_load
from moecule.online import experts_run, set_skip
from moecule.plan import Drop, Keep, Masks, Plan, Skip
from moecule.recipe import Recipe, load_recipe
from moecule.report import report
from moecule.result import Result
from moecule.session import Compute
from moecule.suite import Suite
from moecule.taer import patterns
from moecule.train.fit import Fitted, Fitting, fit
from moecule.train.heal import Healed, heal
from moecule.train.lesson import Lesson
from moecule.train.masks import Learnt, learn_masks
from moecule.train.schedule import Schedule
from moecule.train.slim import Slimmed, slim
from moecule.train.stages import Slimming
from moecule.verbs import Ask, apply, calibrate, plan, read_plan
from moecule.version import VERSION as __version__  # noqa: F401, N811

__all__ = [
    "Aggregated",
    "Ask",
    "Compressed",
    "Compute",
    "Drop",
    "ExpertLoad",
    "Exported",
    "Fitted",
    "Fitting",
    "Generated",
    "Healed",
    "Inspection",
    "Keep",
    "Learnt",
    "Lesson",
    "Masks",
    "MoeculeError",
    "Plan",
    "Recipe",
    "Result",
    "Schedule",
    "Skip",
    "Slimmed",
    "Slimming",
    "Suite",
    "aggregate",
    "apply",
    "calibrate",
    "cloze",
    "compare",
    "compress",
    "evaluate",
    "expert_load",
    "experts_run",
    "export",
    "fit",
    "generate",
    "heal",
    "inspect",
    "learn_masks",
    "load_recipe",
    "patterns",
    "plan",
    "read_plan",
    "report",
    "set_skip",
    "slim",
]
