"""Functions of other libraries that are wrapped for the whole process, where no argument or hook would do."""

from collections.abc import Callable
from functools import wraps
from typing import Any

Function = Callable[..., Any]
WRAPPED_BY = "wrapped_by"  # an attribute, which other wrappers hand on


def wrap_once(owner: Any, name: str, wrapping: Callable[[Function], Function]) -> None:
    """`owner.name` becomes `wrapping` of it from now on; once, however often this is called."""
    theirs = getattr(owner, name)
    before = getattr(theirs, WRAPPED_BY, ())
    if wrapping not in before:
        ours = wraps(theirs)(wrapping(theirs))
        setattr(ours, WRAPPED_BY, (*before, wrapping))
        setattr(owner, name, ours)
