"""Ranks that tests share: what they return, and that a failure says where it happened and harms no later call."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from support.ranks import RankError, RankPool
from torch import distributed

from bridge.jobs import rank_pool

WORLD = 2


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_pool, "AFTERMATH", 1.0)


def sum_of_ranks(scale: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor(distributed.get_rank() * scale)
    distributed.all_reduce(total)
    return os.getpid(), total


def spoil_rank_one(how: str) -> None:
    """Rank 0 waits for rank 1, which does not come."""
    if distributed.get_rank() == 1:
        match how:
            case "raises":
                raise KeyError("planted")
            case "fails":
                pytest.fail("planted")
            case "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crashes":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hangs":
                planted_wait()
    distributed.barrier()


def planted_wait() -> None:
    time.sleep(600)


def test_the_same_ranks_do_every_call(pool: RankPool) -> None:
    first, second = pool.call(sum_of_ranks, 3), pool.call(sum_of_ranks, 5)
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({pid for pid, _ in first}) == WORLD
    assert [total.item() for _, total in first + second] == [3, 3, 5, 5]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "in spoil_rank_one\n.*KeyError: 'planted'"),
        ("fails", "in spoil_rank_one\n.*Failed: planted"),
        ("is killed", "died, exit code -9"),
        ("crashes", "died, exit code -11\n.*Segmentation fault.* in spoil_rank_one"),
        ("hangs", "still at work\n.* in planted_wait\n"),
    ],
)
def test_a_failure_names_its_place_and_the_next_call_works(pool: RankPool, how: str, said: str) -> None:
    pool.call(sum_of_ranks, 1)
    begin = time.monotonic()
    with pytest.raises(RankError, match=rf"(?s)rank 0: .* in spoil_rank_one\n.*rank 1: .*{said}"):
        pool.call(spoil_rank_one, how, seconds=3)
    assert time.monotonic() - begin < 30
    assert [total.item() for _, total in pool.call(sum_of_ranks, 3)] == [3, 3]


def test_a_rank_that_died_between_calls_is_found(pool: RankPool) -> None:
    (victim, _), _ = pool.call(sum_of_ranks, 1)
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(RankError, match="rank 0: died, exit code -9"):
        pool.call(sum_of_ranks, 1)
    assert len(pool.call(sum_of_ranks, 1)) == WORLD
