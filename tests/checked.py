"""Shapes and types are checked at run time, in place of what jaxtyping's decorator does about it.

That one checks arguments, and checks them again beside what is returned; it binds each call's arguments for
its messages, and all this around functions that speak of no array too. Half of the time of all tests went
there. Here beartype checks a function once, and jaxtyping's memory of sizes is opened where arrays are.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

# an int will do for a float, as for mypy
CHECK: Any = beartype(
    conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)
)
ITS_OWN = jaxtyping.jaxtyped


def jaxtyped(what: Any = None, *, typechecker: Any = None) -> Any:
    """A function, or the making of a dataclass, whose arguments and result are checked."""
    if what is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(what):
        if dataclasses.is_dataclass(what):
            what.__init__ = jaxtyped(what.__init__, typechecker=typechecker)
        return what
    # arguments of a generator are checked when it is called, which beartype leaves to its first step
    known = inspect.isfunction(what) and not inspect.isgeneratorfunction(what) and _is_known(what)
    if not known:
        return ITS_OWN(what, typechecker=typechecker)
    once = CHECK(what)
    if not _speaks_of_arrays(what):
        return once

    @functools.wraps(what)
    def checked(*args: Any, **kwargs: Any) -> Any:
        with ITS_OWN("context"):
            return once(*args, **kwargs)

    return checked


def _is_known(function: Any) -> bool:
    """Whether annotations name what is there, or the function's own class, which is being made."""
    try:
        get_type_hints(function)
    except NameError as e:
        return e.name == function.__qualname__.partition(".")[0]
    return True


def _speaks_of_arrays(function: Any) -> bool:
    """Whether an annotation, a text still, has dimensions in quotes."""
    return any(not isinstance(a, str) or '"' in a for a in function.__annotations__.values())


def install() -> None:
    """From here on, for what is imported under jaxtyping's hook."""
    jaxtyping.jaxtyped = jaxtyped
