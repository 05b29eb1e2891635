"""Make Mixture-of-Experts language models small, with proof of what it cost.

Importing this package registers its checkpoints with transformers:

    import moecule
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("out")
"""

from moecule import runtime as _runtime  # noqa: F401  registers
from moecule.compare import compare
from moecule.compress import Compressed, compress
from moecule.errors import MoeculeError
from moecule.evaluate import evaluate
from moecule.generate import Generated, generate
from moecule.inspect import Inspection, inspect
from moecule.online import experts_run, set_skip
from moecule.plan import Drop, Keep, Plan, Skip
from moecule.recipe import Recipe, load_recipe
from moecule.report import report
from moecule.result import Result
from moecule.session import Compute
from moecule.taer import patterns
from moecule.verbs import Ask, apply, calibrate, plan, read_plan

__version__ = "0.1.0"

__all__ = [
    "Ask",
    "Compressed",
    "Compute",
    "Drop",
    "Generated",
    "Inspection",
    "Keep",
    "MoeculeError",
    "Plan",
    "Recipe",
    "Result",
    "Skip",
    "apply",
    "calibrate",
    "compare",
    "compress",
    "evaluate",
    "experts_run",
    "generate",
    "inspect",
    "load_recipe",
    "patterns",
    "plan",
    "read_plan",
    "report",
    "set_skip",
]
