"""Workers, ranks and torchrun's agent that are killed: no process stays behind, nothing is half made, and the same call
finishes it.

Each command runs in processes of its own, as a user's does; what finishes it runs in the test's.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from support.commands import pid_of, processes_with, start_command, wait_for_a_unit
from support.conversions import Conversion, convert
from support.folders import checksums, siblings


@pytest.mark.parametrize("victim", ["worker", pytest.param("parent", marks=pytest.mark.slow)])
def test_killed_with_two_workers(conversions: dict[str, Conversion], tmp_path: Path, out: Path, victim: str):
    job, _, expected = conversions["import"]
    running = start_command(job(out), tmp_path, workers=2)
    wait_for_a_unit(out, running)
    workers = [
        pid for pid in processes_with(running.mark) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(workers[0] if victim == "worker" else running.process.pid, signal.SIGKILL)
    status, said = running.finish()
    if victim == "worker":
        assert status == 2
        assert "a worker process died" in said
    else:
        assert status == -signal.SIGKILL
    assert not out.exists()
    assert convert(job(out)).reused > 0
    assert checksums(out) == expected
    assert siblings(out) == ["out"]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_is_killed(conversions: dict[str, Conversion], tmp_path: Path, out: Path, rank: int):
    job, _, expected = conversions["import"]
    running = start_command(job(out), tmp_path, ranks=2)
    wait_for_a_unit(out, running)
    os.kill(pid_of(rank, running), signal.SIGKILL)
    status, _ = running.finish()
    assert status
    assert not out.exists()
    assert convert(job(out)).reused > 0
    assert checksums(out) == expected
    assert siblings(out) == ["out"]


def test_torchruns_agent_is_killed(conversions: dict[str, Conversion], tmp_path: Path, out: Path):
    """Ranks that nobody watches over end, also one that waits for another."""
    job, _, expected = conversions["import"]
    running = start_command(job(out), tmp_path, ranks=2)
    wait_for_a_unit(out, running)
    waiting, stopped = (pid_of(rank, running) for rank in range(2))
    os.kill(stopped, signal.SIGSTOP)
    os.kill(running.process.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while waiting in processes_with(running.mark):
        assert time.monotonic() < until, "rank 0 waits for a rank that does nothing"
        time.sleep(0.1)
    os.kill(stopped, signal.SIGCONT)
    status, _ = running.finish()
    assert status == -signal.SIGKILL
    assert not out.exists()
    convert(job(out))
    assert checksums(out) == expected
    assert siblings(out) == ["out"]
