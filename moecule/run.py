"""A folder of one compressed model, as reports and comparisons read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moecule.errors import DataError
from moecule.evidence import FILE as EVIDENCE
from moecule.evidence import Evidence, ExpertSums, expert_sums, load_evidence
from moecule.plan import Plan
from moecule.result import Result, load_result


@dataclass(frozen=True)
class Run:
    """What compress, or its parts, left of figures; the weights are not needed."""

    name: str
    folder: Path
    result: Result
    plan: Plan
    evidence: Evidence | None
    experts: dict[int, ExpertSums]  # {} where neither evidence nor stats are there
    mass: str | None
    trial: str | None

    @property
    def recipe(self) -> str:
        """Its name and what was asked of it."""
        made = self.plan.made_by
        return (
            ", ".join(str(made[key]) for key in ("recipe", "budget") if made.get(key)) or "by hand"
        )

    @property
    def original_digest(self) -> str:
        """Of the model that was compressed."""
        found = self.result.original
        return self.plan.digest if found is None or found.digest is None else found.digest


def read_run(folder: str | Path) -> Run:
    """Raises DataError where there is no result, PlanError for no plan, and where one is damaged."""
    path = Path(folder)
    file = path / "result.json"
    if not path.is_dir():
        raise DataError(f"{path} is no folder; name one that moecule compress made")
    if not file.is_file():
        raise DataError(
            f"{path} holds no result.json; run: moecule evaluate {path} --against MODEL"
        )
    if not (path / "plan.yaml").is_file():
        raise DataError(f"{path} holds no plan.yaml, so nothing says what was done; compress again")
    result = load_result(file)
    plan = _plan(path / "plan.yaml")
    if result.plan_digest != plan.code_digest:
        raise DataError(
            f"{file} was measured with another plan than the plan.yaml beside it; run: "
            f"moecule evaluate {path} --against MODEL"
        )
    evidence = load_evidence(path)
    experts, mass, trial = {}, None, None
    if evidence is not None:
        experts, mass, trial = dict(evidence.experts), evidence.mass, evidence.trial
    elif (path / "stats" / "meta.json").is_file():
        experts, mass, trial = expert_sums(path / "stats")
    if experts and {i: len(of.count) for i, of in experts.items()} != {
        i: len(of) for i, of in plan.layers.items()
    }:
        raise DataError(f"{path / EVIDENCE} is of another model than plan.yaml; compress again")
    return Run(path.resolve().name, path, result, plan, evidence, experts, mass, trial)


def read_runs(folders: list[str | Path]) -> list[Run]:
    """Of several folders; those of one name get their paths for names. Raises what `read_run` does."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else Run(**{**vars(run), "name": str(run.folder)})
        for run in runs
    ]


def _plan(file: Path) -> Plan:
    try:
        return Plan.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{file} is no text ({e}); compress again") from e
