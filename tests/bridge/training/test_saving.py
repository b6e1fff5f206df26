"""A checkpoint that is written while training goes on: what is in it, when it counts, and what may be killed."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.ranks import RankError, RankPool
from support.training_faults import (
    MOMENTS,
    die_in_save,
    fail_while_it_is_written,
    write_after_step,
    writer_dies,
    writer_has_no_room,
)
from support.training_runs import SECONDS, checkpoint_tensors, job_of, run_job, training_ranks, values_of

from bridge.training.checkpoints import latest_step
from bridge.training.metrics import read_metrics

SHORT = {"steps": 3, "save_every": 1, "warmup_steps": 0}
NUMBERS = ("step", "loss", "grad_norm", "lr", "aux_loss", "expert_load")


@pytest.fixture(scope="module")
def alone() -> Iterator[RankPool]:
    with training_ranks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def whole(source: Path, alone: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, each saved before the next began."""
    out = tmp_path_factory.mktemp("whole") / "run"
    alone.call(run_job, values_of(job_of(source, out, async_save=False, keep_last=3, **SHORT)))
    return out


def assert_same(run: Path, other: Path, step: int) -> None:
    ours, theirs = checkpoint_tensors(run, step), checkpoint_tensors(other, step)
    assert any("exp_avg_sq" in key for key in ours)
    assert ours.keys() == theirs.keys()
    assert [key for key, value in ours.items() if not torch.equal(value, theirs[key])] == []


def numbers(run: Path) -> list[dict]:
    return [{name: line[name] for name in NUMBERS} for line in read_metrics(run)]


def test_what_is_written_is_what_was_there_when_the_step_ended(
    source: Path, alone: RankPool, whole: Path, tmp_path: Path
) -> None:
    """The checkpoint of step 2 is written when step 3 has changed every weight; until then it is none."""
    run, seen = tmp_path / "run", tmp_path / "seen"
    alone.call(write_after_step, values_of(job_of(source, run, **SHORT | {"save_every": 2})), 2, 3, seen)
    assert seen.read_text() == "nothing complete"
    for step in (2, 3):
        assert_same(run, whole, step)
    assert numbers(run) == numbers(whole)


@pytest.mark.parametrize(("moment", "background"), [*((one, True) for one in MOMENTS), (MOMENTS[0], False)])
def test_killed_while_it_saves_it_goes_on_from_the_checkpoint_before(
    source: Path, alone: RankPool, whole: Path, tmp_path: Path, moment: str, background: bool
) -> None:
    killed = tmp_path / "killed"
    job = job_of(source, killed, async_save=background, **SHORT)
    with pytest.raises(RankError, match="exit code -9"):
        alone.call(die_in_save, values_of(job), 2, moment)
    until = time.monotonic() + 1.5
    assert latest_step(killed / "checkpoints") == 1
    (summary,) = alone.call(run_job, values_of(job))
    assert (summary["first"], summary["last"]) == (1, 3)
    assert numbers(killed) == numbers(whole)
    assert sorted(path.name for path in (killed / "checkpoints").glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert_same(killed, whole, 3)
    if moment == MOMENTS[0]:
        time.sleep(max(0.0, until - time.monotonic()))
        assert not (tmp_path / "orphan").exists()


def test_an_error_in_a_later_step_waits_for_the_checkpoint(
    source: Path, alone: RankPool, whole: Path, tmp_path: Path
) -> None:
    """Of one rank, whose error is nobody else's."""
    values = values_of(job_of(source, tmp_path / "run", **SHORT | {"save_every": 2}))
    ((kind, words),) = alone.call(fail_while_it_is_written, values, "error", seconds=SECONDS)
    assert (kind, words) == ("ZeroDivisionError", "planted")
    assert latest_step(tmp_path / "run" / "checkpoints") == 2
    assert_same(tmp_path / "run", whole, 2)


def test_a_gradient_that_is_not_finite_waits_for_the_checkpoint(source: Path, pair: RankPool, tmp_path: Path) -> None:
    values = values_of(job_of(source, tmp_path / "run", **SHORT | {"save_every": 2}))
    for kind, words in pair.call(fail_while_it_is_written, values, "gradient", seconds=SECONDS):
        assert kind == "NotFiniteError"
        assert "step 3: the gradient is not finite" in words
        assert "this step was not made, and the checkpoint of step 2 is kept" in words
    assert latest_step(tmp_path / "run" / "checkpoints") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL does not notice that a rank is gone; torchrun ends both")
def test_an_error_of_one_rank_of_two_gives_the_checkpoint_up(source: Path, pair: RankPool, tmp_path: Path) -> None:
    """It ends without the other, whose error is what torch.distributed makes of that."""
    values = values_of(job_of(source, tmp_path / "run", **SHORT | {"save_every": 2}))
    with pytest.raises(RankError) as error:
        pair.call(fail_while_it_is_written, values, "error on rank 1", seconds=SECONDS)
    assert error.value.reports[0] == "returned"
    assert error.value.reports[1].startswith("died, exit code 7")
    assert not list((tmp_path / "run" / "checkpoints").rglob("*metadata*"))


def test_a_writer_that_is_killed_is_an_error_on_all_ranks_and_leaves_no_checkpoint(
    source: Path, pair: RankPool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    values = values_of(job_of(source, run, **SHORT, ep=2))
    first, second = pair.call(writer_dies, values, 2, 1, seconds=SECONDS)
    assert first == second
    assert first[0] == "OSError"
    assert "iter_0000002: the process that wrote it died: it was killed" in first[1]
    assert latest_step(run / "checkpoints") == 1
    assert not list((run / "checkpoints" / "iter_0000002").glob("*metadata*"))
    assert pair.call(run_job, values)[0]["first"] == 1


def test_a_file_that_cannot_be_written_is_an_error_on_all_ranks_that_names_it(
    source: Path, pair: RankPool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    values = values_of(job_of(source, run, **SHORT, ep=2))
    first, second = pair.call(writer_has_no_room, values, 1, 1, seconds=SECONDS)
    assert first == second
    assert first[0] == "OSError"
    assert first[1].startswith("[Errno 27] File too large")
    assert "iter_0000001/__1_0.distcp" in first[1]
    assert latest_step(run / "checkpoints") is None
