"""A run whose newest checkpoint is damaged, or not named: what is said before the model is built, and what goes on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ranks import RankPool
from support.training_faults import failed_run
from support.training_runs import SECONDS, job_of, values_of

from bridge.training import train as training
from bridge.training.checkpoints import TRACKER, complete_steps, latest_step
from bridge.training.settings import TrainJob
from bridge.training.train import train

OLDER, NEWEST = "iter_0000001", "iter_0000002"
SHORT = {"steps": 4, "warmup_steps": 0, "save_every": 1}


@pytest.fixture(scope="module")
def begun(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("begun") / "run"
    train(job_of(source, out, until=2, **SHORT))
    return out


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(training, "build", build)


def job_at(source: Path, run: Path) -> TrainJob:
    return job_of(source, run, **SHORT)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# What happens to a file of the newest checkpoint, and what the error says of it.
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut": ("__0_0.distcp", cut, r"__0_0\.distcp: .* and the file has"),
    "no file": ("__0_0.distcp", Path.unlink, r"__0_0\.distcp"),
    "metadata cut": (".metadata", cut, r"\.metadata: cannot be read"),
    "no metadata": (".metadata", Path.unlink, r"\.metadata is missing"),
    "no metadata.json": ("metadata.json", Path.unlink, r"metadata\.json is missing"),
    "nothing": (".", shutil.rmtree, r"iter_0000002 is not there"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it(source: Path, run: Path, name: str) -> None:
    file, act, words = DAMAGE[name]
    act(run / "checkpoints" / NEWEST / file)
    remedy = rf"{words}.*; write 1 into .*{TRACKER}, and the same command goes on"
    with pytest.raises(ValueError, match=remedy):
        train(job_at(source, run))
    cut(run / "checkpoints" / OLDER / "__0_0.distcp")
    with pytest.raises(ValueError, match=rf"{words}.*; no older checkpoint is whole: start anew in another folder"):
        train(job_at(source, run))


def test_the_one_before_is_gone_on_from_where_the_tracker_names_it(source: Path, run: Path) -> None:
    cut(run / "checkpoints" / NEWEST / "__0_0.distcp")
    (run / "checkpoints" / TRACKER).write_text("1")
    summary = train(job_at(source, run).at(until=2))
    assert (summary.first, summary.last) == (1, 2)
    assert latest_step(run / "checkpoints") == 2


def test_all_ranks_say_it_also_of_what_only_reading_tensors_shows(source: Path, pair: RankPool, run: Path) -> None:
    values = values_of(job_at(source, run))
    file = run / "checkpoints" / NEWEST / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    first, second = pair.call(failed_run, values, seconds=SECONDS)
    assert first == second
    assert first[0] == "ValueError"
    assert f"{NEWEST}: cannot be read" in first[1]
    assert "; write 1 into" in first[1]
    cut(file)
    first, second = pair.call(failed_run, values, seconds=SECONDS)
    assert first == second
    assert "__0_0.distcp: " in first[1]


@pytest.mark.usefixtures("no_model")
def test_a_run_is_no_start_where_its_newest_checkpoint_is_damaged(source: Path, run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / NEWEST / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"iter_0000002: has no metadata\.json"):
        train(job_at(source, tmp_path / "other").at(model=str(run)))


@pytest.mark.usefixtures("no_model")
def test_checkpoints_without_a_tracker_file_are_not_deleted(source: Path, run: Path) -> None:
    (run / "checkpoints" / TRACKER).unlink()
    words = rf"{TRACKER}: is not there, and {OLDER}, {NEWEST} are beside it; write the number .*, 2 for the newest"
    with pytest.raises(ValueError, match=words):
        train(job_at(source, run))
    assert complete_steps(run / "checkpoints") == [1, 2]


def test_killed_between_its_first_checkpoint_and_the_tracker_file_it_goes_on_from_there(
    source: Path, run: Path
) -> None:
    """What the kill leaves: one complete checkpoint, and no tracker file."""
    (run / "checkpoints" / TRACKER).unlink()
    shutil.rmtree(run / "checkpoints" / NEWEST)
    summary = train(job_at(source, run).at(until=2))
    assert (summary.first, summary.last) == (1, 2)
    assert complete_steps(run / "checkpoints") == [1, 2]
    assert latest_step(run / "checkpoints") == 2
