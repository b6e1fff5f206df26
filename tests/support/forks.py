"""Processes that start in milliseconds: forks of a server that has imported and compiled everything (`support.warm`).

They can be killed at any moment, fail, or hang; what became of them is an `Outcome`.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.forkserver import _forkserver
from typing import Any, NamedTuple
from unittest.mock import patch

from support.checks import ROOT

TIMEOUT = 120.0  # of what takes a fraction of a second on an idle machine
SINGLE_THREAD = "support.single_thread"  # the first that a server imports
SLOW_IMPORTS = [
    "pytest",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "transformers.models.minimax_m2.modeling_minimax_m2",
    "compiled.norm.modules",
    "bridge.proof.roundtrip",
]
WARM = [SINGLE_THREAD, *SLOW_IMPORTS, "support.warm"]

context = get_context("forkserver")
context.set_forkserver_preload(WARM)


def start_server() -> None:
    """Unless it runs. It finds what it imports by PYTHONPATH alone: Python 3.12 hands it no other path.

    It sees no GPU: CUDA does not survive a fork.
    """
    with patch.dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", CUDA_VISIBLE_DEVICES=""):
        _forkserver.ensure_running()


@contextmanager
def server_of(*modules: str) -> Iterator[None]:
    """Inside this block forks start from a server that has imported these modules instead.

    A process has one server at a time, so the common one starts anew afterwards.
    """
    try:
        _forkserver._stop()
        context.set_forkserver_preload([SINGLE_THREAD, *modules])
        yield
    finally:
        _forkserver._stop()
        context.set_forkserver_preload(WARM)


class Outcome(NamedTuple):
    """What a fork returned, or (type, message, traceback) of what it raised; of one that was killed, neither.

    `exitcode` is None for one that hung.
    """

    exitcode: int | None
    value: Any = None
    error: tuple[str, str, str] | None = None

    @property
    def done(self) -> bool:
        """Whether it returned."""
        return self.exitcode == 0 and self.error is None

    def get(self) -> Any:
        """What it returned, where nothing else may have happened."""
        assert self.exitcode == 0, f"exit code {self.exitcode}"
        assert self.error is None, self.error[2]
        return self.value


class Fork(NamedTuple):
    """A process at work."""

    process: Any
    pipe: Connection

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        self.process.kill()

    def outcome(self) -> Outcome:
        """Waits for its end; a process that hangs is killed."""
        self.process.join(TIMEOUT)
        exitcode = self.process.exitcode
        self.process.kill()
        self.process.join()
        try:
            value, error = self.pipe.recv()
        except EOFError:
            value, error = None, None
        return Outcome(exitcode, value, error)


def fork(function: Callable[..., Any], *arguments: Any) -> Fork:
    """`function(*arguments)`, a function of a module, has begun in another process when this returns."""
    start_server()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_do, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    assert ours.recv() == "begun"
    return Fork(process, ours)


def call(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """`function(*arguments)` in another process, to its end."""
    return fork(function, *arguments).outcome()


def _do(pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    assert SINGLE_THREAD in sys.modules, "the server of forks has not imported what it should have"
    pipe.send("begun")
    try:
        pipe.send((function(*arguments), None))
    except BaseException as error:
        text = "".join(traceback.format_exception(error)[-12:])
        pipe.send((None, (type(error).__name__, str(error), text)))
