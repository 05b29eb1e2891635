"""Run the laws over every family and write what was found to moecule/families.json.

python tests/conform.py              some minutes; after a change of a family or of transformers
python tests/conform.py --readme     the tables of README.md anew: families, methods, results
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAWS = ("test_families.py", "test_laws.py", "test_laws_written.py")


class Outcomes:
    """{family: {test: whether it passed}}, of tests with a family's name among their parameters."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, bool]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of a test."""
        from moecule.family import family_names

        for name in set(re.split(r"[-\[\]]", report.nodeid)) & set(family_names()):
            of = self.held.setdefault(name, {})
            of[report.nodeid] = of.get(report.nodeid, True) and report.passed


README = HERE.parent / "README.md"
TABLE = re.compile(r"^\| families \| \|\n(?:\|.*\n)+", re.MULTILINE)
RESULTS = re.compile(r"^\| original \| method \|.*\n(?:\|.*\n)+", re.MULTILINE)
MEASURED = HERE.parent / "experiments" / "report"  # a folder a model, and in it one a method
METHODS = re.compile(r"^\| method \|.*\n(?:\|.*\n)+", re.MULTILINE)


def write_readme() -> None:
    """Put the tables of families, of methods and of results into README.md."""
    from moecule import catalogue, listing
    from moecule.compare import readme_table as results_table

    text = TABLE.sub(lambda match: catalogue.readme_table(), README.read_text(), count=1)
    text = RESULTS.sub(lambda match: results_table(MEASURED), text, count=1)
    README.write_text(METHODS.sub(lambda match: listing.readme_table(), text, count=1))


def main() -> int:
    """Run, and write down the families for which every law holds; the others are printed."""
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
        return 0
    if "--readme" in sys.argv:
        write_readme()
        return 0
    outcomes = Outcomes()
    tests = [str(HERE / name) for name in LAWS]
    pytest.main([*tests, "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[outcomes])

    import transformers  # pytest wants to see what it imports

    from moecule.catalogue import FOUND

    hold = {name: len(of) for name, of in sorted(outcomes.held.items()) if all(of.values())}
    doc = {"transformers": transformers.__version__, "laws": hold}
    FOUND.write_text(json.dumps(doc, indent=1) + "\n")
    broken = [law for of in outcomes.held.values() for law, held in of.items() if not held]
    print("\n".join(broken))
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main())
