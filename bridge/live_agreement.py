"""Ranks that fail together: an error on one is raised on all, in the same words, and none is left waiting."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed


@contextmanager
def together() -> Iterator[None]:
    """All ranks of the world leave this block by the same door. There must be no communication inside it.

    Raises:
        ValueError: one rank failed; every rank raises the first failing rank's message.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if distributed.get_world_size() == 1:
            raise
        failure = error
    if distributed.get_world_size() > 1 and _any_failed(failure is not None):
        messages = gather(None if failure is None else _message(failure))
        raise ValueError(next(message for message in messages if message is not None)) from failure


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    if distributed.get_world_size() == 1:
        return [value]
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def _any_failed(failed: bool) -> bool:
    on_host = distributed.get_backend() == "gloo"
    flag = torch.tensor([failed], dtype=torch.int32, device="cpu" if on_host else torch.cuda.current_device())
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())


def _message(error: Exception) -> str:
    if isinstance(error, ValueError | OSError):
        return str(error)
    return f"rank {distributed.get_rank()}: {type(error).__name__}: {error}"
