"""Two runs at once on one output: it is exactly one run's, the other one says so, and nothing is left beside it."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import EDGY_CONFIG
from support.conversions import Job, export_job, import_job, run, start
from support.folders import checksums, siblings

from bridge.convert.hf_to_torch_dist import import_checkpoint
from bridge.huggingface.random_checkpoint import make_checkpoint

LOST = ("is not empty", "another run is writing", "the run that this process belongs to has ended", "was empty when")


@pytest.fixture(scope="module")
def jobs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path], Job]]:
    """By what they convert: of two that are raced, the first is always `import` or `export`."""
    folder = tmp_path_factory.mktemp("raced")
    other, megatron, theirs = folder / "other", folder / "megatron", folder / "other megatron"
    make_checkpoint(other, EDGY_CONFIG, seed=1, mtp_layers=1, max_shard_bytes=150_000)
    import_checkpoint(import_job(checkpoint, megatron))
    import_checkpoint(import_job(other, theirs))
    return {
        "import": lambda out: import_job(checkpoint, out),
        "import of another source": lambda out: import_job(other, out),
        "import in another dtype": lambda out: import_job(checkpoint, out)._replace(dtype="fp32"),
        "export": lambda out: export_job(megatron, checkpoint, out),
        "export of another checkpoint": lambda out: export_job(theirs, checkpoint, out),
        "export with another quantisation": lambda out: export_job(megatron, checkpoint, out)._replace(
            quantization="none"
        ),
    }


def race(jobs: list[Callable[[Path], Job]], folder: Path, trials: int, seed: str) -> int:
    """Start two runs at random moments, in either order; how often both were at work."""
    chance, expected, times = random.Random(seed), [], []
    for number, job in enumerate(jobs):
        began = time.monotonic()
        assert run(job(folder / f"alone-{number}")).error is None
        times.append(time.monotonic() - began)
        expected.append(checksums(folder / f"alone-{number}"))
    same, met = expected[0] == expected[1], 0
    for trial in range(trials):
        out = folder / f"trial-{trial}" / "out"
        out.parent.mkdir()
        order = chance.sample([0, 1], 2)
        running = [start(jobs[order[0]](out))]
        time.sleep(chance.uniform(0, 0.5 * min(times)))
        met += running[0].process.is_alive()
        running.append(start(jobs[order[1]](out)))
        outcomes = dict(zip(order, [one.outcome() for one in running], strict=True))
        won = [number for number, outcome in outcomes.items() if outcome.error is None]
        assert won, outcomes
        for number, outcome in outcomes.items():
            if number not in won:
                kind, text, _ = outcome.error
                assert kind in ("ValueError", "OSError"), text
                assert any(words in text for words in LOST), text
        if not same:
            assert len(won) == 1, "one of two that differ has not written what it says"
        assert checksums(out) == expected[won[0]]
        assert siblings(out) == ["out"]
        shutil.rmtree(out.parent)
    return met


PAIRS = {
    "import": ("import", "import of another source", "import in another dtype"),
    "export": ("export", "export of another checkpoint", "export with another quantisation"),
}
RACES = [(first, second) for first, seconds in PAIRS.items() for second in seconds]


@pytest.mark.parametrize(("first", "second"), RACES)
def test_two_at_once(jobs: dict[str, Callable[[Path], Job]], tmp_path: Path, first: str, second: str) -> None:
    assert race([jobs[first], jobs[second]], tmp_path, 4, second) >= 1, "they met"


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), RACES)
def test_two_at_once_often(jobs: dict[str, Callable[[Path], Job]], tmp_path: Path, first: str, second: str) -> None:
    assert race([jobs[first], jobs[second]], tmp_path, 60, f"{second}, often") >= 30, "they met"
