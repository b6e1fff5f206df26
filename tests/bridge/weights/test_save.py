"""Saving a live model, killed at any moment: the output is absent or whole, and the next save leaves nothing behind.

A save by one rank is a fork of a server that holds the loaded model (`support.warm_model`); two ranks build theirs.
`tests/bridge/jobs/test_staging_killed.py` kills before each change to the disk, also while a checkpoint is replaced.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.folders import checksums
from support.forks import TIMEOUT, Fork, call, fork, server_of

SHARD_BYTES, TIMES = 100_000, 30


def save(out: Path, overwrite: bool) -> None:
    from support.warm_model import bridge, model

    bridge.save_hf_pretrained(model, out, overwrite=overwrite, max_shard_bytes=SHARD_BYTES)


def saves(out: Path, *, overwrite: bool = False) -> bool:
    return call(save, out, overwrite).done


@pytest.fixture  # of each test: ranks of their own cannot fork from this server, which is a rank already
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What an undisturbed save leaves; saves fork from the server with the model inside."""
    with pytest.MonkeyPatch.context() as patch, server_of("pytest", "support.warm_model"):
        patch.setenv("WARM_MODEL_CHECKPOINT", str(checkpoint))
        out = tmp_path_factory.mktemp("saved") / "out"
        assert saves(out)
        yield checksums(out)


def timed(act: Callable[[], bool]) -> float:
    """Seconds of a run that must succeed."""
    begin = time.monotonic()
    assert act()
    return time.monotonic() - begin


@pytest.mark.parametrize("kills", [10, pytest.param(TIMES, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, whole: dict[str, str], tmp_path: Path) -> None:
    """Within as long as the last undisturbed save took: the machine may be busy at times."""
    (tmp_path / "timed").mkdir()
    seconds = timed(lambda: saves(tmp_path / "timed/out"))
    moments, killed = random.Random(0), 0
    for number in range(200):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        running = fork(save, out, False)
        running.kill_after(moments.uniform(0, seconds))
        killed += running.outcome().exitcode == -signal.SIGKILL
        assert not out.exists() or checksums(out) == whole
        seconds = timed(lambda out=out: saves(out, overwrite=True))
        assert checksums(out) == whole
        assert os.listdir(out.parent) == ["out"]
        if killed == kills:
            return
    pytest.fail(f"only {killed} of 200 saves were killed before they were done")


# ------------------------------------------------------------------------------------------------------------ two ranks


def save_on_rank(rank: int, folder: Path, source: Path, out: Path) -> None:
    """Leaves a mark beside its process group's store when both ranks have their models."""
    from torch import distributed

    from bridge import MiniMaxM2Bridge
    from bridge.model.process_groups import model_parallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with model_parallel(tensor_model_parallel_size=2), MiniMaxM2Bridge.from_hf_pretrained(source) as bridge:
        model = bridge.to_megatron_model()
        distributed.barrier()
        (folder / f"rank-{rank}-saves").touch()
        bridge.save_hf_pretrained(model, out, overwrite=True, max_shard_bytes=SHARD_BYTES)


def start_ranks(folder: Path, source: Path, out: Path) -> list[Fork]:
    """Both ranks save when this returns."""
    folder.mkdir(parents=True)
    forks = [fork(save_on_rank, rank, folder, source, out) for rank in range(2)]
    until = time.monotonic() + TIMEOUT
    while len(list(folder.glob("rank-*-saves"))) < 2:
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)
    return forks


def succeed(forks: list[Fork]) -> bool:
    return [one.outcome().done for one in forks] == [True, True]


@pytest.mark.slow  # each save starts two ranks and builds their models
def test_a_rank_is_killed_at_random_moments(checkpoint: Path, tmp_path: Path) -> None:
    """The other rank comes to an end, too, and the same save on two ranks again leaves what an undisturbed one does."""
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
