"""Units of work over processes: local ones, or the ranks that torchrun started.

A unit is a call `task(opened, number)` that can be repeated and needs no other unit; `opened` is what all of them need,
such as open files. Locally, worker processes take units as they become free, and each opens what it needs once. In a
process group rank r takes units r, r + world, ... An error in one process ends the run in all of them with that error,
and so does a process that is killed. What was finished is for the task to remember.

torch is imported where it is needed: the command answers `--help` without it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context, parent_process
from typing import Any

from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import all_gather_objects, end_with, raise_on_all_ranks, rank_and_world_size
from bridge.jobs.third_party_logs import drop_remark_on_gpus

Task = Callable[[Any, int], Any]
"""(opened, unit) -> result; a function of a module, since it is sent to other processes."""


def run_units(
    task: Task,
    opened: Any,
    units: Sequence[int],
    *,
    reopen: Callable[[], Any],
    workers: int = 1,
    what: str = "",
    progress: Progress = no_progress,
) -> list[Any]:
    """What `task(opened, unit)` returns, for every unit in order; on every rank.

    `reopen` gives a worker process, which cannot be sent open files, its own `opened`.

    Raises:
        Exception: what a unit raised.
        OSError: a worker process died.
    """
    rank, world = rank_and_world_size()
    if world > 1:
        mine = units[rank::world]
        with raise_on_all_ranks():
            results = [task(opened, unit) for unit in progress(mine, what, len(mine))]
        shares = all_gather_objects(results)
        return [shares[i % world][i // world] for i in range(len(units))]
    if workers == 1 or len(units) < 2:
        return [task(opened, unit) for unit in progress(units, what, len(units))]
    return _in_processes(task, reopen, units, min(workers, len(units)), what, progress)


def _in_processes(
    task: Task, reopen: Callable[[], Any], units: Sequence[int], workers: int, what: str, progress: Progress
) -> list[Any]:
    context = get_context("spawn")  # OpenMP does not survive a fork
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(workers, reopen)) as pool:
        futures = [pool.submit(_run_here, task, unit) for unit in units]
        try:
            for future in progress(as_completed(futures), what, len(futures)):
                future.result()  # raises what the unit raised
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died: it was killed, or memory ran out; what was finished is kept, so run the same "
                "command again, perhaps with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------- in a worker process

_reopen: Callable[[], Any] | None = None


def _start_worker(workers: int, reopen: Callable[[], Any]) -> None:
    """Share the cores with the other workers, and end with the process that started them."""
    global _reopen
    import torch

    drop_remark_on_gpus()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    parent = parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with(parent.pid)
    _reopen = reopen


@cache
def _opened_here() -> Any:
    """Opened at the first unit, not in the initializer, whose errors a pool does not hand on."""
    assert _reopen is not None
    return _reopen()


def _run_here(task: Task, unit: int) -> Any:
    return task(_opened_here(), unit)
