"""What one rank finds out is an error on all, in seconds: other arguments or files, metrics that cannot be written."""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankPool
from support.training_faults import failed_run, planted
from support.training_runs import SECONDS, TEXT, job_of, make_source, run_job, values_of
from torch import distributed

from bridge.training.checkpoints import latest_step
from bridge.training.metrics import read_metrics
from bridge.training.settings import TrainJob
from bridge.training.train import train


def failed_run_of_each(*values: dict[str, Any]) -> tuple[str, str]:
    """Each rank runs its own."""
    return failed_run(values[distributed.get_rank()])


def failed_run_in_own_folder(values: dict[str, Any], machines: Path) -> tuple[str, str]:
    """Relative paths are to a folder of each rank, as if it were on another machine."""
    before = Path.cwd()
    os.chdir(machines / str(distributed.get_rank()))
    try:
        return failed_run(values)
    finally:
        os.chdir(before)


def failed_run_with_packages(values: dict[str, Any], packages: Path) -> tuple[str, str]:
    """Rank 1 finds the packages of a folder first."""
    if distributed.get_rank():
        sys.path.insert(0, str(packages))
    try:
        return failed_run(values)
    finally:
        sys.path[:] = [path for path in sys.path if path != str(packages)]


def failed_run_counted(values: dict[str, Any], remove: Path | None = None) -> tuple[tuple[str, str], float]:
    """And how many steps it has made; in the first of them a folder is removed."""
    passes: list[int] = []

    def count(*_: Any) -> None:
        if remove is not None and distributed.get_rank() == 0:
            shutil.rmtree(remove, ignore_errors=True)
        passes.append(1)

    def plant(trained: Any) -> None:
        trained.chunks[0].register_forward_pre_hook(count)

    with planted(plant):
        found = failed_run(values)
    return found, len(passes) * distributed.get_world_size() / values["global_batch_size"]


def said(pair: RankPool, *call: Any) -> str:
    """What all ranks raise, which must be the same."""
    (kind, words), *others = pair.call(*call, seconds=SECONDS)
    assert others == [(kind, words)]
    assert kind == "ValueError"
    return words


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "tp": ({"tp": 2, "ep": 2, "etp": 1}, "tp: rank 0 has 1, rank 1 has 2"),
    "steps": ({"steps": 7}, "steps: rank 0 has 10, rank 1 has 7"),
    "no such data": ({"data": ("nowhere.txt",)}, "data: rank 0 has "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_arguments(source: Path, pair: RankPool, tmp_path: Path, name: str) -> None:
    job = job_of(source, tmp_path / "run")
    change, expected = CHANGES[name]
    assert said(pair, failed_run_of_each, values_of(job), values_of(job.at(**change))).startswith(expected)
    assert not (tmp_path / "run").exists()


def test_other_files_at_the_same_path(source: Path, pair: RankPool, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "a.txt").write_bytes(TEXT.read_bytes()[: 3999 + int(rank)])
        (tmp_path / rank / "model").symlink_to(source)
    values = values_of(job_of(Path("model"), tmp_path / "run", data=("a.txt",)))
    assert said(pair, failed_run_in_own_folder, values, tmp_path).startswith(
        "size of a.txt: rank 0 has 3999, rank 1 has 4000"
    )
    (tmp_path / "1" / "a.txt").unlink()
    assert said(pair, failed_run_in_own_folder, values, tmp_path) == "a.txt: no such file"
    (tmp_path / "1" / "a.txt").write_bytes((tmp_path / "0" / "a.txt").read_bytes())
    (tmp_path / "1" / "model").unlink()
    make_source(tmp_path / "1" / "model", fp8=False, num_hidden_layers=3)
    found = said(pair, failed_run_in_own_folder, values, tmp_path)
    assert found.startswith("num_hidden_layers of the model: rank 0 has 2, rank 1 has 3")


def test_another_version_of_megatron_core(source: Path, pair: RankPool, tmp_path: Path) -> None:
    metadata = tmp_path / "megatron_core-0.19.99.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.19.99\n")
    words = said(pair, failed_run_with_packages, values_of(job_of(source, tmp_path / "run")), tmp_path)
    assert words.startswith("version of megatron-core: rank 0 has 0.19.")
    assert "rank 1 has 0.19.99" in words


@pytest.mark.parametrize("due", [False, True])
def test_metrics_that_cannot_be_written(source: Path, pair: RankPool, tmp_path: Path, due: bool) -> None:
    """The disk is full, at a step after which the ranks meet at a checkpoint, or only in the next step."""
    run = tmp_path / "run"
    job = job_of(source, run, steps=4, warmup_steps=0, ep=2)
    pair.call(run_job, values_of(job.at(until=1)))
    (run / "metrics.jsonl").rename(run / "kept")
    (run / "metrics.jsonl").symlink_to("/dev/full")
    values = values_of(job.at(save_every=2 if due else None))
    first, second = pair.call(failed_run_counted, values, seconds=SECONDS)
    words = f"[Errno 28] No space left on device: '{run / 'metrics.jsonl'}'"
    assert first == second == (("OSError", words), 1 if due else 2)
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "1", "step 2 has no line"
    (run / "kept").rename(run / "metrics.jsonl")
    pair.call(run_job, values_of(job))
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]


def test_a_folder_that_is_removed(source: Path, pair: RankPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = values_of(job_of(source, run, steps=4, ep=2))
    first, second = pair.call(failed_run_counted, values, run, seconds=SECONDS)
    words = f"[Errno 2] Was deleted while the run goes on: '{run / 'metrics.jsonl'}'"
    assert first == second == (("FileNotFoundError", words), 2)


def run_that_rank_one_is_asked_to_end(values: dict[str, Any]) -> dict[str, Any]:
    """In the second of its steps; it gets a signal that the others do not."""
    passes = itertools.count(1)

    def ask(*_: Any) -> None:
        if next(passes) == values["global_batch_size"] // distributed.get_world_size() + 1 and distributed.get_rank():
            os.kill(os.getpid(), signal.SIGUSR2)

    with planted(lambda trained: trained.chunks[0].register_forward_pre_hook(ask)):
        return train(TrainJob(**values), stop_signals=(signal.SIGUSR2,))._asdict()


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(source: Path, pair: RankPool, tmp_path: Path) -> None:
    """After the step in which it came, or the next: what a rank has to say goes with the losses."""
    values = values_of(job_of(source, tmp_path / "run", steps=6))
    one, other = pair.call(run_that_rank_one_is_asked_to_end, values, seconds=SECONDS)
    assert one["last"] == other["last"] == latest_step(tmp_path / "run" / "checkpoints") in (2, 3)
    assert (one["stopped_by"], other["stopped_by"]) == (0, signal.SIGUSR2)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, one["last"] + 1))
    (first, *_) = pair.call(run_job, values, seconds=SECONDS)
    assert (first["first"], first["last"], first["stopped_by"]) == (one["last"], 6, None)
