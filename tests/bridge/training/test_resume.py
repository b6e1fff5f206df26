"""A run that stops and goes on: in the same layout bit for bit, in another one to rounding; killed while it saves."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.ranks import RankError, RankPool
from support.training_runs import (
    MOMENTS,
    checkpoint_tensors,
    die_in_save,
    job_of,
    make_source,
    run_job,
    values_of,
)

from bridge.training.checkpoints import latest_step
from bridge.training.metrics import MetricsWriter, read_metrics
from bridge.training.settings import TrainJob
from bridge.training.train import train

STEPS, STOP = 6, 3
NUMBERS = ("step", "loss", "grad_norm", "lr", "aux_loss", "expert_load")
TP2_EP2 = {"tp": 2, "ep": 2, "etp": 1}
OTHERS = {"pp2 vpp2": {"pp": 2, "vpp": 2}, "dp2": {}, "ep2": {"ep": 2}}
# As in test_layouts: sums in another order, three steps long; there a step is off by a few roundings of its loss.
RELATIVE = 16 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


def job_at(source: Path, out: Path, **changes) -> TrainJob:
    return job_of(source, out, **{"steps": STEPS, "dtype": "bf16"} | changes)


@pytest.fixture(scope="module")
def uninterrupted(source: Path, pair: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    pair.call(run_job, values_of(job_at(source, out, **TP2_EP2)))
    return out


@pytest.fixture(scope="module")
def stopped(source: Path, pair: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 run's first half."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    pair.call(run_job, values_of(job_at(source, out, dtype="fp32", until=STOP, **TP2_EP2)))
    assert latest_step(out / "checkpoints") == STOP
    return out


def copy_and_go_on(source: Path, pair: RankPool, stopped: Path, out: Path, layout: dict) -> Path:
    shutil.copytree(stopped, out)
    pair.call(run_job, values_of(job_at(source, out, dtype="fp32", **layout)))
    return out


@pytest.fixture(scope="module")
def gone_on(source: Path, pair: RankPool, stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its second half at its own layout."""
    return copy_and_go_on(source, pair, stopped, tmp_path_factory.mktemp("gone on") / "run", TP2_EP2)


def numbers(run: Path) -> list[dict]:
    return [{name: line[name] for name in NUMBERS} for line in read_metrics(run)]


def test_in_the_same_layout_every_bit_is_the_uninterrupted_run_s(
    source: Path, pair: RankPool, uninterrupted: Path, tmp_path: Path
) -> None:
    """Losses, norms, weights, float32 weights and moments, in bfloat16 with float32 routers."""
    out = tmp_path / "run"
    pair.call(run_job, values_of(job_at(source, out, until=STOP, **TP2_EP2)))
    (first, *_) = pair.call(run_job, values_of(job_at(source, out, **TP2_EP2)))
    assert (first["first"], first["last"]) == (STOP, STEPS)
    assert numbers(out) == numbers(uninterrupted)
    ours, theirs = checkpoint_tensors(out, STEPS), checkpoint_tensors(uninterrupted, STEPS)
    assert any("exp_avg_sq" in key for key in ours)
    assert ours.keys() == theirs.keys()
    assert [key for key, value in ours.items() if not torch.equal(value, theirs[key])] == []


@pytest.mark.parametrize("name", OTHERS)
def test_in_another_layout_it_goes_on_to_rounding(
    source: Path, pair: RankPool, stopped: Path, gone_on: Path, tmp_path: Path, name: str
) -> None:
    """Of the same halfway checkpoint: the second half at another layout is the second half at its own."""
    out = copy_and_go_on(source, pair, stopped, tmp_path / "other", OTHERS[name])
    for ours, theirs in zip(numbers(out), numbers(gone_on), strict=True):
        for key in ("loss", "grad_norm", "aux_loss"):
            print(f"{key} {ours['step']}: off by {abs(ours[key] / theirs[key] - 1):.1e}")
            assert ours[key] == pytest.approx(theirs[key], rel=RELATIVE), (key, ours["step"])


SHORT = {"steps": 3, "save_every": 1, "warmup_steps": 0}


@pytest.fixture(scope="module")
def alone() -> Iterator[RankPool]:
    with RankPool(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def whole(source: Path, alone: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    alone.call(run_job, values_of(job_of(source, out, **SHORT)))
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_saves_it_goes_on_from_the_checkpoint_before(
    source: Path, alone: RankPool, whole: Path, tmp_path: Path, moment: str
) -> None:
    killed = tmp_path / "killed"
    with pytest.raises(RankError, match="exit code -9"):
        alone.call(die_in_save, values_of(job_of(source, killed, **SHORT)), 2, moment)
    assert latest_step(killed / "checkpoints") == 1
    (summary,) = alone.call(run_job, values_of(job_of(source, killed, **SHORT)))
    assert (summary["first"], summary["last"]) == (1, 3)
    assert numbers(killed) == numbers(whole)
    assert sorted(path.name for path in (killed / "checkpoints").glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    ours, theirs = checkpoint_tensors(killed, 3), checkpoint_tensors(whole, 3)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_line_that_was_cut_off_is_written_again(whole: Path, tmp_path: Path) -> None:
    """And what a killed run wrote beyond its last checkpoint."""
    (tmp_path / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    writer = MetricsWriter(tmp_path, 1)
    writer.write({"step": 2, "loss": 0.5})
    writer.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [read_metrics(whole)[0]["loss"], 0.5]


def test_what_was_just_saved_is_kept_whatever_else_is_there(source: Path, tmp_path: Path) -> None:
    """A run that was set back to an earlier step, and a checkpoint that someone copied aside."""
    run = tmp_path / "run"
    changes = {"save_every": 1, "keep_last": 1}
    train(job_at(source, run, until=1, **changes))
    folder = run / "checkpoints"
    for name in ("iter_0000020", "iter_0000030", "iter_0000001_good"):
        shutil.copytree(folder / "iter_0000001", folder / name)
    train(job_at(source, run, until=2, **changes))
    assert latest_step(folder) == 2
    kept = {"iter_0000002", "iter_0000020", "iter_0000030", "iter_0000001_good"}
    assert {path.name for path in folder.glob("iter_*")} == kept
