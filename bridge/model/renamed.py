"""A function of megatron-core's in which some names mean something else."""

from collections.abc import Callable
from types import FunctionType
from typing import Any


def with_names[**P, R](function: Callable[P, R], **names: Any) -> Callable[P, R]:
    """A copy of a Python function, and of the functions in it, that finds `names` where it looks for global ones.

    The function itself, and so whoever else calls it, is left as it is.

    Raises:
        ValueError: it is wrapped in another one, or its module has no such name: megatron-core has changed, and what
            is to be replaced would not be.
    """
    made: Any = function
    if not isinstance(made, FunctionType) or made.__closure__ is not None:
        raise ValueError(f"{made!r} must be a plain function of its module; this megatron-core's is wrapped, use 0.19")
    lacking = names.keys() - made.__globals__.keys() | names.keys() - _named(made.__code__)
    if lacking:
        raise ValueError(
            f"{made.__module__}.{made.__qualname__} does not use {', '.join(sorted(lacking))}; megatron-core 0.19 does"
        )
    copy: Any = FunctionType(made.__code__, made.__globals__ | names, made.__name__, made.__defaults__)
    copy.__kwdefaults__ = made.__kwdefaults__
    return copy


def _named(code: Any) -> set[str]:
    """Global names and attributes that a function uses, and the functions in it."""
    inner = [one for one in code.co_consts if isinstance(one, type(code))]
    return {*code.co_names}.union(*map(_named, inner))
