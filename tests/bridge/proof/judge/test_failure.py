"""What the judge says of ranks that fail, on real ones."""

import os
import signal

import pytest
import torch
from support.ranks import RankError, RankPool
from torch import distributed

from bridge.proof.judge import failure
from bridge.proof.judge.failure import failure_of


def rank_one(how: str) -> None:
    """Rank 0 waits for rank 1, which does not come."""
    if distributed.get_rank():
        match how:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exits":
                os._exit(3)
            case "raises":
                raise RuntimeError("planted")
    distributed.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", "the process of rank 1 was ended by SIGKILL, perhaps for lack of memory"),
        ("exits", "it ends the process of rank 1, with exit code 3"),
        ("raises", "it raises RuntimeError: planted"),
    ],
)
def test_the_rank_that_is_to_blame_is_told(how: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.jobs.rank_pool.AFTERMATH", 2.0)
    with RankPool(2) as pool, pytest.raises(RankError) as raised:
        pool.call(rank_one, how)
    assert failure_of(raised.value).reason == reason


def test_an_attention_that_there_is_not_is_told_with_its_remedy() -> None:
    report = "Traceback\nValueError: No dot product attention backend is available for the provided inputs. Please\n"
    assert "--dtype bf16" in failure_of(RankError("failed", [report])).reason


@pytest.mark.parametrize("here", [True, False])
def test_transformer_engine_is_missed_only_where_it_is_missing(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "_transformer_engine_is_here", lambda: here)
    error = RankError("failed", ["Traceback\nValueError: Transformer Engine takes no such width\n"])
    assert failure_of(error).reason.startswith("it raises ValueError" if here else "it needs Transformer Engine")
