"""How long work shows its progress: a function around the loop, so that the work itself knows no terminal."""

from collections.abc import Callable, Iterable

Progress = Callable[[Iterable, str, int], Iterable]
"""Wraps an iterable of known length: (iterable, what is being done, length)."""


def no_progress(iterable: Iterable, what: str, length: int) -> Iterable:
    """Shows nothing."""
    return iterable
