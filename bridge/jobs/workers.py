"""Units of work over processes: local ones, or the ranks that torchrun started.

A unit is a call `task(job, number)` that can be repeated and needs no other unit. Locally, `workers` processes take
units as they become free; in a process group rank r takes units r, r + world, ... An error in one process ends the run
in all of them with that error; a process that is killed ends it too. What was finished is for the task to remember.

torch is imported where it is needed: the command answers `--help` without it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import all_gather_objects, end_with, raise_on_all_ranks, rank_and_world_size

Task = Callable[[Any, int], Any]


def run_units(
    task: Task, job: Any, units: Sequence[int], *, workers: int = 1, what: str = "", progress: Progress = no_progress
) -> list[Any]:
    """What `task(job, unit)` returns, for every unit in order; on every rank.

    Raises:
        Exception: what a unit raised.
        OSError: a worker process died.
    """
    rank, world = rank_and_world_size()
    if world > 1:
        mine = units[rank::world]
        with raise_on_all_ranks():
            results = [task(job, unit) for unit in progress(mine, what, len(mine))]
        shares = all_gather_objects(results)
        return [shares[i % world][i // world] for i in range(len(units))]
    if workers == 1 or len(units) < 2:
        return [task(job, unit) for unit in progress(units, what, len(units))]
    return _in_processes(task, job, units, min(workers, len(units)), what, progress)


def _in_processes(task: Task, job: Any, units: Sequence[int], workers: int, what: str, progress: Progress) -> list[Any]:
    context = get_context("spawn")  # OpenMP does not survive a fork
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(workers,)) as pool:
        futures = [pool.submit(task, job, unit) for unit in units]
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


def _start_worker(workers: int) -> None:
    """Share the cores with the other workers, and end with the process that started them."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    end_with(parent_process().pid)
