"""A folder made of independent units of work, by several processes, in one go or in several.

This ties `bridge.jobs.workers` (who does which unit) to `bridge.jobs.staging` (what is finished, and when the folder
appears).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import all_gather_objects, check_same_on_all_ranks, is_rank_zero, raise_on_all_ranks
from bridge.jobs.staging import Staging
from bridge.jobs.workers import run_units

Task = Callable[[Any, int, Path], tuple[list[str], Any]]
"""(opened, unit, folder) -> (the files written there, the result as JSON); a function of a module."""


class Work(NamedTuple):
    """What is made at `out`: units 0 to `num_units` - 1 of `job` (a NamedTuple of JSON values) by `task`.

    `open(job)` opens what the units need; each process does so once.
    """

    open: Callable[[Any], Any]
    task: Task
    job: Any
    num_units: int
    out: Path

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the result."""
        return {"task": self.task.__module__, **self.job._asdict()}


class Output(NamedTuple):
    """How the folder is completed and put in place.

    `finish(folder, results)` completes it; `replaces` says which files of an existing folder it replaces, None if none
    may be there; `then()` is called once it is in place, and may be called twice.
    """

    finish: Callable[[Path, list[Any]], None]
    replaces: Callable[[str], bool] | None = None
    then: Callable[[], None] = lambda: None


class Done(NamedTuple):
    """The units' results in order, and how many of them an earlier run had finished.

    `results` is None where another run with the same inputs finished while this one waited for it.
    """

    results: list[Any] | None
    reused: int


class _Joined(NamedTuple):
    """What a process needs for its units."""

    work: Work
    opened: Any
    staging: Staging


def run_resumable(
    work: Work, opened: Any, output: Output, *, workers: int = 1, what: str = "", progress: Progress = no_progress
) -> Done:
    """Do every unit that is not done, complete the folder, and put it in place.

    `opened` is what `work.open(work.job)` gave this process. All ranks must have the same `work`.

    Raises:
        ValueError: `out` is not fit, ranks have different work, or a unit raised it.
        OSError: the disk is full, or a worker died. What was finished is kept. Under torchrun all ranks raise the same.
    """
    check_same_on_all_ranks({**work.inputs, "num_units": work.num_units, **versions()})
    with ExitStack() as stack:
        with raise_on_all_ranks(), _naming(work.out):
            staging = None
            if is_rank_zero():
                staging = stack.enter_context(Staging(work.out, inputs=work.inputs, replaces=output.replaces))
            known = None if staging is None else _finished_before(work, staging, output)
        known = all_gather_objects(known)[0]
        if known is not None:
            return known
        try:
            done = _do_units(work, opened, stack, workers, what, progress)
            results = [result for result, _ in done]
            with raise_on_all_ranks(), _naming(work.out):
                if staging is not None:
                    output.finish(staging.folder, results)
                    staging.publish(output.then)
        except (ValueError, OSError) as error:
            if staging is not None and staging.folder.exists():
                error.add_note(
                    f"what was finished is kept in {staging.folder} ({staging.kept_bytes:,} bytes): the same command "
                    "goes on from there; delete it to give the room back"
                )
            raise
        return Done(results, sum(reused for _, reused in done))


def versions(*more: str) -> dict[str, str]:
    """Of what decides a result's bytes, and of `more` packages; one that runs from its sources has none."""
    found = {}
    for name in ("minimax-m2", "torch", "safetensors", *more):
        try:
            found[f"version of {name}"] = version(name)
        except PackageNotFoundError:
            found[f"version of {name}"] = "not installed"
    return found


def _finished_before(work: Work, staging: Staging, output: Output) -> Done | None:
    """What a run came to that finished while this one waited, or was killed when its output was in place already."""
    if staging.finished_by_another:
        return Done(None, work.num_units)
    if not staging.published:
        return None
    results = [staging.finished(f"unit-{unit}") for unit in range(work.num_units)]
    if None in results:
        raise ValueError(
            f"{staging.out}: was complete and has been changed since; delete it, and what is to be made anew"
        )
    output.then()
    staging.forget()
    return Done(results, len(results))


def _do_units(
    work: Work, opened: Any, stack: ExitStack, workers: int, what: str, progress: Progress
) -> list[tuple[Any, bool]]:
    with raise_on_all_ranks():
        joined = _Joined(work, opened, stack.enter_context(Staging.join(work.out, work.inputs)))
    units, reopen = range(work.num_units), partial(_join, work)
    return run_units(_unit, joined, units, reopen=reopen, workers=workers, what=what, progress=progress)


def _join(work: Work) -> _Joined:
    return _Joined(work, work.open(work.job), Staging.join(work.out, work.inputs))


def _unit(joined: _Joined, unit: int) -> tuple[Any, bool]:
    """A unit's result, and whether an earlier run had it."""
    work, opened, staging = joined
    with _naming(work.out):
        finished = staging.finished(f"unit-{unit}")
        if finished is not None:
            return finished, True
        files, result = work.task(opened, unit, staging.folder)
        staging.record(f"unit-{unit}", files, result)
        return result, False


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Errors of the disk name the folder: one that comes while a file is written names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
