"""The options of the command line, as the verbs share them, and what they stand for."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moecule.complete import models, recipes
from moecule.errors import RecipeError
from moecule.show import hush

Model = Annotated[
    str,
    typer.Argument(
        help="A folder, a Hub id in the cache, or: embedded.",
        metavar="MODEL",
        autocompletion=models,
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="A recipe by name (moecule recipes), or a .toml file.",
        autocompletion=recipes,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key: encode.damp=0.05", metavar="KEY=VALUE"),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Calibration text: plain, or JSON lines of documents or conversations."),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a window.")]
Bits = Annotated[
    float | None, typer.Option(help="Mean code bits over the weights of the experts that stay.")
]
Size = Annotated[str | None, typer.Option(help="True bytes of the checkpoint: 20GB, 16GiB.")]
Fit = Annotated[str | None, typer.Option(help="As --size, with a KV cache of --context tokens.")]
Gone = Annotated[
    str | None,
    typer.Option(
        "--drop",
        help="Share of the experts, or of their channels, that goes: 25%.",
        metavar="SHARE",
    ),
]
Clamp = Annotated[
    bool,
    typer.Option("--clamp", help="Where fewer stay than the router picks, let it pick fewer."),
]
Target = Annotated[
    str | None,
    typer.Option(help="What is to load it: transformers, vllm or gguf. The plan keeps to that."),
]
Context = Annotated[int, typer.Option(help="Tokens of the KV cache that --fit leaves room for.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a model.")
]
Where = Literal["auto", "device", "host", "disk"]
StatesAt = Annotated[
    Where, typer.Option("--states", help="Where hidden states lie: auto, device, host or disk.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no tables; warnings and errors.")
]
Texts = Annotated[
    list[Path] | None, typer.Option("--text", help="Text to evaluate on, as --data; may repeat.")
]
SkipFlag = Annotated[bool, typer.Option("--skip", help="With the online skipping saved in it.")]
Exact = Annotated[
    bool, typer.Option("--exact", help="Do not round activations to int8 where it is faster.")
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Compile a step into a CUDA graph first.")
]
ExpertCache = Annotated[
    str | None,
    typer.Option(help="Experts in host memory, so many bytes of the GPU for those used most: 8GB."),
]


Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks of lm-evaluation-harness, or of --task-dir: piqa,arc_easy.", metavar="A,B"
    ),
]
TaskDir = Annotated[
    Path | None, typer.Option(help="Task files, NAME.jsonl each; without --tasks all of them.")
]
Limit = Annotated[int | None, typer.Option(help="Items of each task; without: all.")]
Shots = Annotated[int | None, typer.Option(help="Solved items before each one that is asked.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Decode as many sequences at once as fit: 24GB, or: original (it, and one sequence).",
        metavar="SIZE",
    ),
]
Held = Annotated[
    int, typer.Option("--context", help="Tokens of each sequence that --memory is to hold.")
]
PatternsFile = Annotated[
    Path | None,
    typer.Option("--patterns", help="What moecule patterns made: load a task's experts alone."),
]
Chosen = Annotated[int | None, typer.Option("--experts", help="Of a layer, with --patterns.")]
Match = Annotated[
    Literal["spread", "tcess"],
    typer.Option(help="How a prompt finds its task: ours, or the paper's."),
]
Domains = Annotated[
    list[str],
    typer.Option("--domain", help="A task and its text; may repeat.", metavar="NAME=FILE"),
]


LoadFlag = Annotated[
    bool,
    typer.Option(
        "--load", help="How text uses the experts, where to place them, what a cache would serve."
    ),
]
Gpus = Annotated[
    int | None, typer.Option(help="With --load: GPUs that share the experts, 8 where not given.")
]
Replicas = Annotated[
    int | None,
    typer.Option(
        help="With --load: slots a GPU beyond one copy of every expert, 1 where not given."
    ),
]
CacheExperts = Annotated[
    list[str] | None,
    typer.Option(help="With --load: experts of a layer in the cache, 4 or 50%; may repeat."),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine", help="With --load: its file too: sglang, tensorrt-llm, vllm-ascend; may repeat."
    ),
]
LoadOut = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="With --load: the file, expert_load.json where not given."),
]


def hushable(verb: Callable[..., None]) -> Callable[..., None]:
    """The command with an option more, which all have: --quiet."""

    @wraps(verb)
    def told(*args: Any, quiet: bool, **kwargs: Any) -> None:
        hush(quiet)
        verb(*args, **kwargs)

    given, kind = inspect.signature(verb, eval_str=True), inspect.Parameter.KEYWORD_ONLY
    quiet = inspect.Parameter("quiet", kind, default=False, annotation=Quiet)
    vars(told)["__signature__"] = given.replace(parameters=[*given.parameters.values(), quiet])
    told.__annotations__ = {p.name: p.annotation for p in (*given.parameters.values(), quiet)}
    return told


def compute_of(device: str, dtype: str, trust: bool, states: Where = "auto") -> Any:
    """Where it runs, as one of the processes that torchrun started."""
    from moecule.session import Compute

    return Compute(device, dtype, trust, states).joined()


def refuse_beside(load: bool, of_load: Mapping[str, Any], of_plan: Mapping[str, Any]) -> None:
    """Raise RecipeError for options that do nothing with --load, or without it."""
    idle = [name for name, value in (of_plan if load else of_load).items() if value is not None]
    if idle:
        option = "--" + idle[0].removesuffix("s" if idle[0] == "engines" else "").replace("_", "-")
        raise RecipeError(
            f"{option} is not of --load; leave one of them out"
            if load
            else f"{option} goes with --load; add that, or leave it out"
        )


def recipe_of(name: str, sets: list[str] | None, samples: int | None, length: int | None) -> Any:
    """The recipe with its changes. Raises RecipeError for a --set that is none."""
    from moecule.recipe import load_recipe

    changes: dict[str, Any] = {}
    for item in sets or []:
        key, found, value = item.partition("=")
        if not found:
            raise RecipeError(f"--set {item!r}: wanted KEY=VALUE, like encode.damp=0.05")
        try:
            changes[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = value.strip()
    if samples is not None:
        changes["data.samples"] = samples
    if length is not None:
        changes["data.length"] = length
    return load_recipe(name, changes)


def suite_of(tasks: str | None, folder: Path | None, limit: int | None, shots: int | None) -> Any:
    """What is asked of a model, None for nothing. Raises RecipeError for what cannot be."""
    from moecule.suite import Suite

    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if tasks is None and folder is None:
        if limit is not None or shots is not None:
            raise RecipeError("--limit and --shots are of tasks; give --tasks or --task-dir, too")
        return None
    return Suite(names, folder, limit, shots)


def domains_of(given: list[str]) -> dict[str, str]:
    """{name: file}. Raises RecipeError for what is not NAME=FILE, and a name given twice."""
    found: dict[str, str] = {}
    for item in given:
        name, _, file = item.partition("=")
        if not name or not file:
            raise RecipeError(f"--domain {item!r}: wanted NAME=FILE, like law=law.jsonl")
        if name in found:
            raise RecipeError(f"--domain {name} is given twice; put its text into one file")
        found[name] = file
    return found
