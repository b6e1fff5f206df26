"""What checks the reference while tests run: typeguard, where a signature has shapes.

`pytest --jaxtyping-packages=reference,support.shapes.typechecked` gives it every function. Those without an array in
their signature are basedpyright's to check: looking at every tuple of numbers in every call took half of the run.
"""

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import typeguard
from jaxtyping import AbstractArray


def typechecked(function: Callable) -> Callable:
    """Check the arguments and the result of each call, if any of them is or holds an array."""
    has_array = any(map(_has_array, function.__annotations__.values()))
    return typeguard.typechecked(function) if has_array else function


def _has_array(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    fields = get_type_hints(hint).values() if hasattr(hint, "_fields") else ()
    return any(map(_has_array, (*get_args(hint), *fields)))
