"""Ranks that fail together: an error on one is raised on all, with the same words, and none waits for another forever.

Where there is no process group, there is one rank. torch is imported when it is needed: the command answers `--help`
without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    from torch import distributed

    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_leader() -> bool:
    """Whether this process acts for all: rank 0, or the only one."""
    return place()[0] == 0


@contextmanager
def together() -> Iterator[None]:
    """All ranks of the world leave this block by the same door. There must be no communication inside it.

    Raises:
        ValueError: one rank failed; every rank raises the first failing rank's message. One rank alone raises its own
            error.
    """
    rank, world = place()
    failure = None
    try:
        yield
    except Exception as error:
        if world == 1:
            raise
        failure = error
    if world > 1 and _any_failed(failure is not None):
        messages = gather(None if failure is None else _message(failure, rank))
        raise ValueError(next(message for message in messages if message is not None)) from failure


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    from torch import distributed

    world = place()[1]
    if world == 1:
        return [value]
    found = [None] * world
    distributed.all_gather_object(found, value)
    return found


def _any_failed(failed: bool) -> bool:
    import torch
    from torch import distributed

    on_host = "gloo" in distributed.get_backend_config()
    flag = torch.tensor([failed], dtype=torch.int32, device="cpu" if on_host else torch.cuda.current_device())
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())


def _message(error: Exception, rank: int) -> str:
    if isinstance(error, ValueError | OSError):
        return str(error)
    return f"rank {rank}: {type(error).__name__}: {error}"
