"""Saving a live model, killed at any moment: the output is absent or whole, and the next save leaves nothing behind.

Each save is a fork of a server that holds the loaded model (`faults_model`).
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from faults_runs import Run, die_at, forks, snapshot, warm_server

SHARD_BYTES = 100_000


def save(pipe: Connection, out: str, overwrite: bool, fault: partial | None) -> None:
    from faults_model import bridge, model

    pipe.send("started")
    if fault is not None:
        fault()
    bridge.save_hf_pretrained(model, out, overwrite=overwrite, max_shard_bytes=SHARD_BYTES)
    pipe.send((None, None))


def start(out: Path, *, overwrite: bool = False, fault: partial | None = None) -> Run:
    ours, theirs = forks.Pipe(duplex=False)
    process = forks.Process(target=save, args=(theirs, str(out), overwrite, fault))
    process.start()
    theirs.close()
    ours.recv()
    return Run(process, ours)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What an undisturbed save leaves."""
    with warm_server(checkpoint, "faults_model"):
        out = tmp_path_factory.mktemp("saved") / "out"
        assert start(out).outcome().exitcode == 0
        yield snapshot(out)


@pytest.mark.parametrize("times", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments(whole: dict[str, str], tmp_path: Path, times: int) -> None:
    (tmp_path / "timed").mkdir()
    begin = time.monotonic()
    assert start(tmp_path / "timed/out").outcome().exitcode == 0
    seconds, moments, killed = time.monotonic() - begin, random.Random(0), 0
    for number in range(200):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        running = start(out)
        running.kill_after(moments.uniform(0, seconds))
        killed += running.outcome().exitcode == -signal.SIGKILL
        assert not out.exists() or snapshot(out) == whole
        assert start(out, overwrite=True).outcome().exitcode == 0
        assert snapshot(out) == whole
        assert os.listdir(out.parent) == ["out"]
        if killed == times:
            return
    pytest.fail(f"only {killed} of 200 saves were killed before they were done")


def test_killed_while_it_replaces_a_checkpoint(whole: dict[str, str], tmp_path: Path) -> None:
    """At every third change to the file system: the old or the new one is there, or both whole beside it."""
    for number in range(0, 600, 3):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        assert start(out).outcome().exitcode == 0
        (out / "notes.txt").write_text("of the old one")
        old = snapshot(out)
        outcome = start(out, overwrite=True, fault=partial(die_at, number, out.parent)).outcome()
        if out.exists():
            assert snapshot(out) in (old, whole)
        else:
            assert snapshot(out.with_name(".out.old")) == old
            assert snapshot(out.with_name(".out.partial")) == whole
        if outcome.exitcode == 0:
            assert number > 30, "a save makes more changes than that"
            return
        assert start(out, overwrite=True).outcome().exitcode == 0
        assert snapshot(out) == whole
    pytest.fail("a save makes fewer changes than that")
