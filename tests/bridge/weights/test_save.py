"""Saving a live model, killed at any moment: the output is absent or whole, and the next save leaves nothing behind.

A save by one rank is a fork of a server that holds the loaded model (`faults_model`); two ranks build theirs.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.faults_runs import Run, checksums, die_at, fork, warm_server
from support.ranks import SLOW_IMPORTS

SHARD_BYTES, TIMES = 100_000, 30


def save(pipe: Connection, out: str, overwrite: bool, fault: partial | None) -> None:
    from support.faults_model import bridge, model

    pipe.send("started")
    if fault is not None:
        fault()
    bridge.save_hf_pretrained(model, out, overwrite=overwrite, max_shard_bytes=SHARD_BYTES)
    pipe.send((None, None))


def start(out: Path, *, overwrite: bool = False, fault: partial | None = None) -> Run:
    running = fork(save, str(out), overwrite, fault)
    running.pipe.recv()
    return running


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What an undisturbed save leaves."""
    with warm_server(checkpoint, "support.faults_model"):
        out = tmp_path_factory.mktemp("saved") / "out"
        assert start(out).outcome().exitcode == 0
        yield checksums(out)


def timed(act: Callable[[], bool]) -> float:
    """Seconds of a run that must succeed."""
    begin = time.monotonic()
    assert act()
    return time.monotonic() - begin


def test_killed_at_random_moments(whole: dict[str, str], tmp_path: Path) -> None:
    """Within as long as the last undisturbed save took: the machine may be busy at times."""
    (tmp_path / "timed").mkdir()
    seconds = timed(lambda: start(tmp_path / "timed/out").outcome().exitcode == 0)
    moments, killed = random.Random(0), 0
    for number in range(200):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        running = start(out)
        running.kill_after(moments.uniform(0, seconds))
        killed += running.outcome().exitcode == -signal.SIGKILL
        assert not out.exists() or checksums(out) == whole
        seconds = timed(lambda out=out: start(out, overwrite=True).outcome().exitcode == 0)
        assert checksums(out) == whole
        assert os.listdir(out.parent) == ["out"]
        if killed == TIMES:
            return
    pytest.fail(f"only {killed} of 200 saves were killed before they were done")


def test_killed_while_it_replaces_a_checkpoint(whole: dict[str, str], tmp_path: Path) -> None:
    """At every third change to the file system: the old or the new one is there, or both whole beside it."""
    for number in range(0, 600, 3):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        assert start(out).outcome().exitcode == 0
        (out / "notes.txt").write_text("of the old one")
        old = checksums(out)
        outcome = start(out, overwrite=True, fault=partial(die_at, number, out.parent)).outcome()
        if out.exists():
            assert checksums(out) in (old, whole)
        else:
            assert checksums(out.with_name(".out.old")) == old
            assert checksums(out.with_name(".out.partial")) == whole
        if outcome.exitcode == 0:
            assert number > 30, "a save makes more changes than that"
            return
        assert start(out, overwrite=True).outcome().exitcode == 0
        assert checksums(out) == whole
    pytest.fail("a save makes fewer changes than that")


# ------------------------------------------------------------------------------------------------------------ two ranks


def save_on_rank(pipe: Connection, rank: int, folder: str, source: str, out: str) -> None:
    from torch import distributed

    from bridge import MiniMaxM2Bridge
    from bridge.model.process_groups import model_parallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with model_parallel(tensor_model_parallel_size=2), MiniMaxM2Bridge.from_hf_pretrained(source) as bridge:
        model = bridge.to_megatron_model()
        distributed.barrier()
        pipe.send("started")
        bridge.save_hf_pretrained(model, out, overwrite=True, max_shard_bytes=SHARD_BYTES)
    pipe.send((None, None))


def start_ranks(folder: Path, source: Path, out: Path) -> list[Run]:
    folder.mkdir(parents=True)
    runs = [fork(save_on_rank, rank, str(folder), str(source), str(out)) for rank in range(2)]
    for running in runs:
        running.pipe.recv()
    return runs


def succeed(runs: list[Run]) -> bool:
    return [running.outcome().exitcode for running in runs] == [0, 0]


@pytest.mark.slow  # each save starts two ranks and builds their models
def test_a_rank_is_killed_at_random_moments(checkpoint: Path, tmp_path: Path) -> None:
    """The other rank comes to an end, too, and the same save on two ranks again leaves what an undisturbed one does."""
    with warm_server(checkpoint, "support.faults_warm", *SLOW_IMPORTS):
        out, moments, killed = tmp_path / "out", random.Random(0), 0
        running = start_ranks(tmp_path / "undisturbed", checkpoint, out)
        seconds, whole = timed(lambda: succeed(running)), checksums(out)
        for number in range(4 * TIMES):
            out, victim = tmp_path / str(number) / "out", number % 2
            running = start_ranks(tmp_path / str(number) / "ranks", checkpoint, out)
            running[victim].kill_after(moments.uniform(0, seconds))
            codes = [one.outcome().exitcode for one in running]
            assert None not in codes, "a rank hangs"
            killed += codes[victim] == -signal.SIGKILL
            assert not out.exists() or checksums(out) == whole
            again = start_ranks(tmp_path / str(number) / "again", checkpoint, out)
            seconds = timed(lambda again=again: succeed(again))
            assert checksums(out) == whole
            assert sorted(os.listdir(out.parent)) == ["again", "out", "ranks"]
            if killed == TIMES:
                return
        pytest.fail(f"only {killed} of {number + 1} saves were killed before they were done")
