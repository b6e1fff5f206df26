"""Signals that end a run after its step, and those that do not."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.training import stop
from bridge.training.checkpoint_writer import _Results, _write
from bridge.training.stop import asked_to_stop


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_it_says_which_came_first_and_leaves_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with asked_to_stop((signal.SIGTERM, signal.SIGINT)) as came:
        assert came() == 0
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert came() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_later_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "AGAIN_SECONDS", 0.0)
    with asked_to_stop((signal.SIGINT,)) as came:
        os.kill(os.getpid(), signal.SIGINT)
        assert came() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_so() -> None:
    """As nohup and a shell's background have it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with asked_to_stop((signal.SIGINT,)) as came:
        os.kill(os.getpid(), signal.SIGINT)
        assert came() == 0


def test_a_process_that_writes_outlives_the_signals_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def written(*_: Any) -> list[Any]:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return ["whole"]

    monkeypatch.setattr("bridge.training.checkpoint_writer._written", written)
    results, parent = _Results(), os.getpid()
    child = os.fork()
    if not child:
        _write(parent, [], [], results)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert results.get() == ["whole"]
