"""The ranks of a torch.distributed run: joining them, and errors that are raised on all of them.

Where there is no process group, there is one rank. torch is imported when it is needed: the command answers `--help`
without it.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ContextDecorator, contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count, zip_longest
from traceback import format_exception
from typing import Any

RANK_TIMEOUT = timedelta(minutes=30)  # a rank waits this long for the others: the difference of their shares of work
LEADER_TIMEOUT = timedelta(hours=6)  # and this long where rank 0 runs the reference; one that is killed is noticed
PARENT_SECONDS = 0.1  # how often a process looks whether the one that started it is there


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    from torch import distributed

    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_rank_zero() -> bool:
    """Whether this process acts for all: rank 0, or the only one; known without importing torch."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If the block raises on any rank, every rank raises; no collectives inside.

    One rank alone raises its own error. Of several ranks, the error of the first that failed is raised on all:

    Raises:
        ValueError, OSError: that rank's, with its words.
        RuntimeError: it raised something else, which is a bug; the text has its traceback.
    """
    rank, world = rank_and_world_size()
    failure = None
    try:
        yield
    except Exception as error:
        if world == 1:
            raise
        failure = error
    if world > 1 and _any_failed(failure is not None):
        errors = all_gather_objects(None if failure is None else _as_sent(failure, rank))
        raise next(error for error in errors if error is not None) from failure


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    from torch import distributed

    world = rank_and_world_size()[1]
    if world == 1:
        return [value]
    found = [None] * world
    distributed.all_gather_object(found, value)
    return found


def check_same_on_all_ranks(values: Mapping[str, Any]) -> None:
    """Every rank has the same values as rank 0; all ranks must call it, and all raise the same.

    Raises:
        ValueError: one has not; names the rank, the value and the difference.
    """
    first, *others = all_gather_objects(dict(values))
    for rank, theirs in enumerate(others, 1):
        for name in first | theirs:  # in one order on every rank
            if first.get(name) != theirs.get(name):
                ours, other = _difference(first.get(name), theirs.get(name))
                raise ValueError(
                    f"{name}: rank 0 has {ours}, rank {rank} has {other}; start all ranks with the same arguments and "
                    "versions, on files that all of them share"
                )


def _difference(a: Any, b: Any) -> tuple[Any, Any]:
    """Two values that differ, or the first of their items that do."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return next(((x, y) for x, y in zip_longest(a, b, fillvalue="nothing") if x != y), (a, b))
    return a, b


def backends() -> dict[str, str]:
    """What moves tensors of each type of device between the ranks."""
    from torch import distributed

    return dict(part.split(":") for part in str(distributed.get_backend_config()).split(","))


def _any_failed(failed: bool) -> bool:
    import torch
    from torch import distributed

    on_host = backends().get("cpu") == "gloo"
    flag = torch.tensor([failed], dtype=torch.int32, device="cpu" if on_host else torch.cuda.current_device())
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())


def _as_sent(error: Exception, rank: int) -> Exception:
    """The error as other ranks raise it: of a kind that they can unpickle."""
    if isinstance(error, OSError):
        words = error.args if error.filename is None else (error.errno, error.strerror, error.filename)
        return OSError(*words)
    if isinstance(error, ValueError):
        return ValueError(str(error))
    return RuntimeError(f"rank {rank} failed:\n{''.join(format_exception(error))}")


def launched_by_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@cache
def end_with(parent: int) -> None:
    """An orphan would go on writing where the same command, run again, writes."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@cache
def _torchruns_store(timeout: timedelta) -> tuple[Any, int, int]:
    """torchrun's store of keys, this rank and the number of ranks; one connection for as long as the process lasts.

    Where torchrun has no store itself, rank 0 has one: if it closed that after a block, the others would lose the next.
    """
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://", timeout=timeout)))


_times_joined = count()  # of this process; the ranks join together, so they agree on it


class TorchrunRanks(ContextDecorator):
    """torchrun's process group, for as long as a `with` block or a decorated function lasts.

    It moves host tensors by gloo and, with `models`, a GPU's by NCCL; all ranks must enter it. Where there is a process
    group already, or torchrun did not start this process, nothing is done. A rank lives no longer than torchrun does.
    """

    def __init__(self, *, models: bool = False):
        self._models = models
        self._mine: list[bool] = []  # of each block that is open: a decorated function may call itself

    def __enter__(self) -> None:
        from torch import distributed

        mine = launched_by_torchrun() and not distributed.is_initialized()
        if mine:
            end_with(os.getppid())
            _join(models=self._models)
        self._mine.append(mine)

    def __exit__(self, *_: object) -> None:
        if self._mine.pop():
            from torch import distributed

            with suppress(RuntimeError):
                distributed.destroy_process_group()


def _join(*, models: bool) -> None:
    import torch
    from torch import distributed
    from torch._C._distributed_c10d import PrefixStore

    gpus = models and torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = LEADER_TIMEOUT if models else RANK_TIMEOUT
    store, rank, world = _torchruns_store(timeout)
    # The store keeps every key, and ranks that found those of an earlier group would look for each other in vain.
    own = PrefixStore(f"minimax-m2/{next(_times_joined)}", store)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    distributed.init_process_group(backend, timeout=timeout, store=own, rank=rank, world_size=world)
