"""What a benchmark runs is ended with all that it has started, however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import child

HERE = Path(__file__).parent
# It starts a process in a session of its own, as torchrun does, writes down which, and waits.
LAUNCHER = """
import pathlib, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(rank.pid))
time.sleep(600)
"""
BENCHMARK = """
import sys; sys.path.insert(0, sys.argv[1])
import pathlib, child
child.end_all_when_ended()
child.run([sys.executable, "-c", sys.argv[3], sys.argv[2]], pathlib.Path(sys.argv[2] + ".log"), 600)
"""


@pytest.fixture
def note(tmp_path: Path) -> Iterator[Path]:
    """Where the launcher writes its rank, which is ended if nobody has."""
    path = tmp_path / "rank"
    yield path
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(int(path.read_text()), signal.SIGKILL)


def is_there(pid: int) -> bool:
    """And not only waited for by nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return met


def written(note: Path) -> bool:
    return note.exists() and note.read_text() != ""


def test_what_hangs_is_ended_with_its_ranks(note: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(note)]
    assert child.run(command, note.with_suffix(".log"), 60, hangs=lambda: written(note)) is None
    assert wait_for(lambda: not is_there(int(note.read_text())))


def test_a_benchmark_that_is_ended_ends_them(note: Path) -> None:
    benchmark = subprocess.Popen([sys.executable, "-c", BENCHMARK, str(HERE), str(note), LAUNCHER])
    try:
        assert wait_for(lambda: written(note))
        rank = int(note.read_text())
        assert is_there(rank)
        benchmark.terminate()
        assert benchmark.wait(30) == 128 + signal.SIGTERM
        assert wait_for(lambda: not is_there(rank))
    finally:
        benchmark.kill()
