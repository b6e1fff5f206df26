"""A folder made of independent units of work, by several processes, in one go or in several.

This ties `bridge.jobs.workers` (who does which unit) to `bridge.jobs.staging` (what is finished, and when the folder
appears).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import all_gather_objects, is_rank_zero, raise_on_all_ranks
from bridge.jobs.staging import Staging
from bridge.jobs.workers import run_units

Task = Callable[[Any, int, Path], tuple[list[str], Any]]
"""(opened, unit, folder) -> (the files written there, the result as JSON); a function of a module."""


class Work(NamedTuple):
    """What is made: units 0 to `num_units` - 1 of `job` (a NamedTuple of JSON values with an `out`) by `task`.

    `open(job)` opens what the units need; each process does so once.
    """

    open: Callable[[Any], Any]
    task: Task
    job: Any
    num_units: int


class Done(NamedTuple):
    """The units' results in order, and how many of them an earlier run had finished."""

    results: list[Any]
    reused: int


class _Joined(NamedTuple):
    """What a process needs for its units."""

    work: Work
    opened: Any
    staging: Staging


def run_resumable(
    work: Work,
    opened: Any,
    finish: Callable[[Path, list[Any]], None],
    *,
    marker: str,
    workers: int = 1,
    overwrite: bool = False,
    what: str = "",
    progress: Progress = no_progress,
) -> Done:
    """Do every unit that is not done, let `finish(folder, results)` complete the folder, and put it in place.

    `opened` is what `work.open(work.job)` gave this process.

    Raises:
        ValueError: `job.out` is not fit, or a unit raised it.
        OSError: the disk is full, or a worker died. What was finished is kept. Under torchrun all ranks raise the same.
    """
    with ExitStack() as stack:

        def open_staging() -> Staging:
            inputs = {"task": work.task.__module__, **work.job._asdict()}
            with _naming(work.job.out):
                return stack.enter_context(Staging(work.job.out, inputs=inputs, overwrite=overwrite, marker=marker))

        with raise_on_all_ranks():
            staging = open_staging() if is_rank_zero() else None
            known = _finished_before(work, staging) if staging is not None and staging.published else None
        known = all_gather_objects(known)[0]
        if known is not None:
            return Done(known, len(known))
        with raise_on_all_ranks():
            joined = stack.enter_context(Staging.join(work.job.out))
        done = run_units(
            _unit,
            _Joined(work, opened, joined),
            range(work.num_units),
            reopen=partial(_join, work),
            workers=workers,
            what=what,
            progress=progress,
        )
        results = [result for result, _ in done]
        with raise_on_all_ranks(), _naming(work.job.out):
            if staging is not None:
                finish(staging.folder, results)
                staging.publish()
        return Done(results, sum(reused for _, reused in done))


def _finished_before(work: Work, staging: Staging) -> list[Any]:
    """The results of a run that was killed when its output was in place already."""
    results = [staging.finished(f"unit-{unit}") for unit in range(work.num_units)]
    if None in results:
        raise ValueError(
            f"{staging.out}: was complete and has been changed since; delete it, and what is to be made anew"
        )
    staging.forget()
    return results


def _join(work: Work) -> _Joined:
    return _Joined(work, work.open(work.job), Staging.join(work.job.out))


def _unit(joined: _Joined, unit: int) -> tuple[Any, bool]:
    """A unit's result, and whether an earlier run had it."""
    work, opened, staging = joined
    with _naming(work.job.out):
        finished = staging.finished(f"unit-{unit}")
        if finished is not None:
            return finished, True
        files, result = work.task(opened, unit, staging.folder)
        staging.record(f"unit-{unit}", files, result)
        return result, False


@contextmanager
def _naming(out: str) -> Iterator[None]:
    """Errors of the disk name the folder: one that comes while a file is written names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, out) from error
        raise
