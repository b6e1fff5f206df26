"""Ranks that stay: processes of one process group on this machine, which do one call after another.

    with RankPool(2) as pool:
        values = pool.call(function, argument)  # what each rank returned

Each rank is a fresh Python, which finds modules where this process does. torch is imported when they start.
"""

import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from bridge.jobs.third_party_logs import drop_remark_on_gpus

SECONDS = 300.0  # of a call, where an idle machine takes a few
AFTERMATH = 10.0  # that the others get once a rank has failed: those that wait for it never end
STACK_SECONDS = 1.0  # to write down where it stands

# How reports begin that are not a traceback.
RETURNED, DIED, STILL_AT_WORK = "returned", "died, exit code ", "still at work"


class RankError(AssertionError):
    """A call that did not return on every rank, with what each rank raised or where it stood, by rank."""

    def __init__(self, message: str, reports: list[str]):
        super().__init__("\n\n".join([message, *(f"rank {rank}: {report}" for rank, report in enumerate(reports))]))
        self.reports = reports


class Answer(NamedTuple):
    """What came of a call on one rank: the pickled value, or else what went wrong."""

    value: bytes | None
    error: str = RETURNED


class _Rank(NamedTuple):
    process: Any
    pipe: Connection
    stack: Path


class RankPool:
    """`world` ranks, which start with the first call or with `start`.

    A call that fails on any rank ends them all, and the next call starts new ones: it finds nothing of the failure.

    Args:
        world: how many ranks.
        backend: torch.distributed's; with "nccl" each rank has a GPU of its own.
        quiet: what the ranks print is dropped.
        environment: variables that the ranks have besides this process's.
    """

    def __init__(
        self,
        world: int,
        backend: str = "gloo",
        *,
        quiet: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        self.world, self.backend, self.quiet, self.environment = world, backend, quiet, dict(environment)
        self._ranks: list[_Rank] = []
        self._folder: TemporaryDirectory | None = None

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """What `function(*arguments)` returns, by rank. It must be a function of a module, which the ranks import.

        Raises:
            RankError: a rank raised an error, died, or was not done after so many seconds.
        """
        work = pickle.dumps((function, arguments))
        if not self._ranks:
            self.start()
        for rank in self._ranks:
            with suppress(OSError):  # it died after the last call, which `_answers` finds
                rank.pipe.send_bytes(work)
        answers = self._answers(time.monotonic() + seconds)
        if any(answer.value is None for answer in answers):
            for rank in self._ranks:
                rank.process.kill()
            self.end()
            raise RankError(f"{function.__name__} failed", [answer.error for answer in answers])
        return [pickle.loads(answer.value) for answer in answers if answer.value is not None]

    def end(self) -> None:
        """The ranks leave, with what they have started; those that cannot, because they are at work, are killed."""
        for rank in self._ranks:
            rank.pipe.close()
        for rank in self._ranks:
            rank.process.join(AFTERMATH)
            rank.process.kill()
            rank.process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._ranks, self._folder = [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> None:
        """The ranks start, if they have not, and this call does not wait until they can work."""
        if self._ranks:
            return
        context: Any = self.context()
        self._folder = TemporaryDirectory(prefix="ranks-")
        for number in range(self.world):
            ours, theirs = context.Pipe()
            settings = (self.world, self.backend, self.quiet, self.environment)
            arguments = (number, *settings, Path(self._folder.name), theirs)
            process = context.Process(target=_serve, args=arguments)
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, _stack_file(Path(self._folder.name), number)))

    def context(self) -> BaseContext:
        """How processes start."""
        return get_context("spawn")

    def _answers(self, deadline: float) -> list[Answer]:
        answers: dict[int, Answer] = {}
        while len(answers) < self.world and time.monotonic() < deadline:
            waiting: dict[Any, int] = {
                rank.pipe: number for number, rank in enumerate(self._ranks) if number not in answers
            }
            for pipe in wait(list(waiting), deadline - time.monotonic()):
                answer = answers[waiting[pipe]] = self._answer(self._ranks[waiting[pipe]])
                if answer.value is None:
                    deadline = min(deadline, time.monotonic() + AFTERMATH)
        silent = [rank for number, rank in enumerate(self._ranks) if number not in answers]
        for rank in silent:
            os.kill(rank.process.pid, signal.SIGUSR1)
        time.sleep(STACK_SECONDS if silent else 0)
        return [
            answers.get(number) or Answer(None, f"{STILL_AT_WORK}\n{rank.stack.read_text()}")
            for number, rank in enumerate(self._ranks)
        ]

    def _answer(self, rank: _Rank) -> Answer:
        try:
            return rank.pipe.recv()
        except EOFError:
            rank.process.join(AFTERMATH)
            return Answer(None, f"{DIED}{rank.process.exitcode}\n{rank.stack.read_text()}")


def _stack_file(folder: Path, rank: int) -> Path:
    """Where a rank that is killed or asked writes its stack."""
    return folder / f"stack-{rank}"


def _serve(
    rank: int,
    world: int,
    backend: str,
    quiet: bool,
    environment: dict[str, str],
    folder: Path,
    pipe: Connection,
) -> None:
    """A rank's life: calls come from the pipe until it is closed."""
    os.environ |= environment
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
    import torch
    from torch import distributed

    drop_remark_on_gpus()
    with _stack_file(folder, rank).open("w") as stack:
        faulthandler.enable(stack)
        faulthandler.register(signal.SIGUSR1, stack)
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
        with suppress(EOFError):
            while True:
                pipe.send(_do(pipe.recv_bytes()))
        distributed.destroy_process_group()


def _do(work: bytes) -> Answer:
    try:
        function, arguments = pickle.loads(work)
        return Answer(pickle.dumps(function(*arguments)))
    except BaseException as error:
        return Answer(None, "".join(traceback.format_exception(error)))
