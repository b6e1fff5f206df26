"""A run that stops and goes on: in the same layout bit for bit, in another one to rounding."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.ranks import RankPool
from support.training_runs import checkpoint_tensors, job_of, make_source, run_job, values_of

from bridge.training.checkpoints import latest_step
from bridge.training.metrics import MetricsWriter, read_metrics
from bridge.training.settings import TrainJob
from bridge.training.train import train

STEPS, STOP = 4, 2
NUMBERS = ("step", "loss", "grad_norm", "lr", "aux_loss", "expert_load")
TP2_EP2 = {"tp": 2, "ep": 2, "etp": 1}
OTHERS = {"pp2 vpp2": {"pp": 2, "vpp": 2}, "dp2": {}, "ep2": {"ep": 2}}
# As in test_layouts: sums in another order, two steps long; there a step is off by a few roundings of its loss. Of
# bfloat16 a rounding is much: half of one of the loss, and one of the others, which it would not keep to if a parameter
# were given another's moments.
RELATIVE = {
    "fp32": dict.fromkeys(("loss", "grad_norm", "aux_loss"), 16 * torch.finfo(torch.float32).eps),
    "bf16": {"loss": 2**-9, "grad_norm": 2**-8, "aux_loss": 2**-8},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "hf", fp8=False)


def job_at(source: Path, out: Path, **changes) -> TrainJob:
    return job_of(source, out, **{"steps": STEPS, "warmup_steps": 1, "dtype": "bf16"} | changes)


@pytest.fixture(scope="module")
def uninterrupted(source: Path, pair: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved without a process in the background, after each half."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    pair.call(run_job, values_of(job_at(source, out, async_save=False, save_every=STOP, **TP2_EP2)))
    return out


class Halves(NamedTuple):
    """A run's first half in a dtype, and a copy that went on at its own layout."""

    dtype: str
    stopped: Path
    gone_on: Path


def copy_and_go_on(source: Path, pair: RankPool, stopped: Path, out: Path, dtype: str, layout: dict) -> Path:
    shutil.copytree(stopped, out)
    pair.call(run_job, values_of(job_at(source, out, dtype=dtype, **layout)))
    return out


@pytest.fixture(scope="module", params=RELATIVE)
def halves(
    source: Path, pair: RankPool, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Halves:
    folder, dtype = tmp_path_factory.mktemp("stopped"), request.param
    pair.call(run_job, values_of(job_at(source, folder / "run", dtype=dtype, until=STOP, **TP2_EP2)))
    assert latest_step(folder / "run" / "checkpoints") == STOP
    gone_on = copy_and_go_on(source, pair, folder / "run", folder / "gone on", dtype, TP2_EP2)
    return Halves(dtype, folder / "run", gone_on)


def files_of(run: Path, step: int) -> dict[str, bytes]:
    """The files of a checkpoint but for `.metadata`, which has a number of each save and its path."""
    files = (run / "checkpoints" / f"iter_{step:07d}").iterdir()
    return {file.name: file.read_bytes() for file in files if file.name != ".metadata"}


def numbers(run: Path) -> list[dict]:
    return [{name: line[name] for name in NUMBERS} for line in read_metrics(run)]


def same_numbers(run: Path) -> list[dict]:
    """As `numbers`, and equal where two runs are the same: the fused router adds what it reports in no fixed order."""
    ulp = torch.finfo(torch.float32).eps if torch.cuda.is_available() else 0.0
    return [line | {"aux_loss": pytest.approx(line["aux_loss"], rel=4 * ulp, abs=0)} for line in numbers(run)]


def test_in_the_same_layout_every_bit_is_the_uninterrupted_run_s(
    source: Path, pair: RankPool, uninterrupted: Path, tmp_path: Path
) -> None:
    """Losses, norms, weights, float32 weights and moments, in bfloat16 with float32 routers; every file of each rank.

    Saved in the background, where the other was not.
    """
    out = tmp_path / "run"
    pair.call(run_job, values_of(job_at(source, out, until=STOP, **TP2_EP2)))
    (first, *_) = pair.call(run_job, values_of(job_at(source, out, **TP2_EP2)))
    assert (first["first"], first["last"]) == (STOP, STEPS)
    assert numbers(out) == same_numbers(uninterrupted)
    ours, theirs = checkpoint_tensors(out, STEPS), checkpoint_tensors(uninterrupted, STEPS)
    assert any("exp_avg_sq" in key for key in ours)
    assert ours.keys() == theirs.keys()
    assert [key for key, value in ours.items() if not torch.equal(value, theirs[key])] == []
    for step in (STOP, STEPS):
        ours, theirs = files_of(out, step), files_of(uninterrupted, step)
        assert ours.keys() == theirs.keys() >= {"__0_0.distcp", "__1_0.distcp", "metadata.json"}
        assert [name for name, data in ours.items() if theirs[name] != data] == []


@pytest.mark.parametrize("name", OTHERS)
def test_in_another_layout_it_goes_on_to_rounding(
    source: Path, pair: RankPool, halves: Halves, tmp_path: Path, name: str
) -> None:
    """Of the same halfway checkpoint: the second half at another layout is the second half at its own."""
    out = copy_and_go_on(source, pair, halves.stopped, tmp_path / "other", halves.dtype, OTHERS[name])
    for ours, theirs in zip(numbers(out), numbers(halves.gone_on), strict=True):
        for key, relative in RELATIVE[halves.dtype].items():
            print(f"{key} {ours['step']}: off by {abs(ours[key] / theirs[key] - 1):.1e}")
            assert ours[key] == pytest.approx(theirs[key], rel=relative), (key, ours["step"])


def test_a_line_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    """And what a killed run wrote beyond its last checkpoint."""
    lines = [{"step": step, "loss": 4.0 / step} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "lo')
    assert read_metrics(tmp_path) == lines
    writer = MetricsWriter(tmp_path, 1)
    writer.write({"step": 2, "loss": 0.5})
    writer.close()
    assert read_metrics(tmp_path) == [lines[0], {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize("line", ["{}", "[1]", '{"step": "1"}', "\0\0", "\udcff", "[" * 100_000], ids=range(6))
def test_a_line_that_is_no_step_s_is_refused(tmp_path: Path, line: str) -> None:
    text = '{"step": 1, "loss": 4.0}\n' + line + "\n"
    (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not what was written of a step; delete that line"):
        read_metrics(tmp_path)


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
