"""Units of work over processes: local ones, or the ranks that torchrun started.

A unit is a call `task(job, number)` that can be repeated and needs no other unit. Locally, `workers` processes take
units as they become free; in a process group rank r takes units r, r + world, ... An error in one process ends the run
in all of them with that error; a process that is killed ends it too. What was finished is for the task to remember.

torch is imported where it is needed: the command answers `--help` without it.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context, parent_process
from typing import Any

from bridge.agreement import gather, place, together
from bridge.progress import Track, untracked

RANK_TIMEOUT = timedelta(minutes=30)  # a rank waits this long for the others: the difference of their shares of work
LEADER_TIMEOUT = timedelta(hours=6)  # and this long where rank 0 runs the reference; one that is killed is noticed
PARENT_SECONDS = 0.1  # how often a process looks whether the one that started it is there

Task = Callable[[Any, int], Any]


def launched_by_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run_units(
    task: Task, job: Any, units: Sequence[int], *, workers: int = 1, what: str = "", track: Track = untracked
) -> list[Any]:
    """What `task(job, unit)` returns, for every unit in order; on every rank.

    Raises:
        Exception: what a unit raised.
        OSError: a worker process died.
    """
    rank, world = place()
    if world > 1:
        mine = units[rank::world]
        with together():
            results = [task(job, unit) for unit in track(mine, what, len(mine))]
        shares = gather(results)
        return [shares[i % world][i // world] for i in range(len(units))]
    if workers == 1 or len(units) < 2:
        return [task(job, unit) for unit in track(units, what, len(units))]
    return _in_processes(task, job, units, min(workers, len(units)), what, track)


def _in_processes(task: Task, job: Any, units: Sequence[int], workers: int, what: str, track: Track) -> list[Any]:
    context = get_context("spawn")  # OpenMP does not survive a fork
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(workers,)) as pool:
        futures = [pool.submit(task, job, unit) for unit in units]
        try:
            for future in track(as_completed(futures), what, len(futures)):
                future.result()  # raises what the unit raised
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died: it was killed, or memory ran out; what was finished is kept, so run the same "
                "command again, perhaps with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(workers: int) -> None:
    """Share the cores with the other workers, and end with the process that started them."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    _end_with(parent_process().pid)


def _end_with(parent: int) -> None:
    """An orphan would go on writing where the same command, run again, writes."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def join_ranks(*, models: bool) -> None:
    """Join torchrun's process group, which moves host tensors by gloo and, with `models`, a GPU's by NCCL."""
    import torch
    from torch import distributed

    gpus = models and torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = LEADER_TIMEOUT if models else RANK_TIMEOUT
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timeout)


class Ranks:
    """`join_ranks` for as long as a `with` block lasts, and no longer than torchrun does; nothing for one process."""

    def __init__(self, *, models: bool = False):
        self._models = models

    def __enter__(self) -> None:
        self._mine = launched_by_torchrun() and place()[1] == 1
        if self._mine:
            _end_with(os.getppid())
            join_ranks(models=self._models)

    def __exit__(self, *_: object) -> None:
        if self._mine:
            from torch import distributed

            with suppress(RuntimeError):
                distributed.destroy_process_group()
