"""An offline import or export killed at any moment: its output is whole or absent, and the same call finishes it."""

import random
import shutil
import signal
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from support.faults_runs import DIRECTIONS, Conversion, checksums, die_at, finished_files, flip, run, siblings, start

pytestmark = pytest.mark.usefixtures("warm")


class Tally(NamedTuple):
    killed: int
    reused: int
    damaged: int
    finished_by_the_killed: int


def kill_and_finish(conversion: Conversion, folder: Path, kills: int, seed: str) -> Tally:
    """Kill runs, once or several times each, and finish them."""
    chance = random.Random(seed)
    times = []
    for trial in range(3):
        began = time.monotonic()
        assert run(conversion.job(folder / f"timed-{trial}")).error is None
        times.append(time.monotonic() - began)
    killed = reused = damaged = early = trial = 0
    while killed < kills:
        trial += 1
        alone = folder / f"trial-{trial}"
        alone.mkdir()
        out = alone / "out"
        for _ in range(chance.choice([1, 1, 2, 3])):
            victim = start(conversion.job(out))
            victim.kill_after(chance.uniform(0, statistics.median(times)))
            killed += victim.outcome().exitcode == -signal.SIGKILL
            if out.exists():
                break
        if out.exists():  # the kill came after the last rename
            early += 1
            assert checksums(out) == conversion.expected
            shutil.rmtree(alone)
            continue
        finished = finished_files(out)
        spoil = finished and chance.random() < 0.3
        if spoil:
            file = chance.choice(finished)
            flip(file, chance.randrange(file.stat().st_size), chance.randrange(8))
        again = run(conversion.job(out))
        assert again.error is None
        assert again.summary.reused == len(finished) - bool(spoil)
        assert checksums(out) == conversion.expected
        assert siblings(out) == ["out"]
        reused, damaged = reused + (again.summary.reused > 0), damaged + bool(spoil)
        shutil.rmtree(alone)
    return Tally(killed, reused, damaged, early)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_at_random_moments(conversions: dict[str, Conversion], tmp_path: Path, direction: str):
    tally = kill_and_finish(conversions[direction], tmp_path, 30, direction)
    print(direction, tally)
    assert tally.killed >= 30
    assert tally.reused >= 5
    assert tally.damaged >= 1


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_at_many_random_moments(conversions: dict[str, Conversion], tmp_path: Path, direction: str):
    tally = kill_and_finish(conversions[direction], tmp_path, 100, f"{direction} at length")
    print(direction, tally)
    assert tally.killed >= 100


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_at_each_step_of_replacing_a_checkpoint(
    conversions: dict[str, Conversion], tmp_path: Path, direction: str
):
    """At every change to the file system from the first rename on: the old or the new one is there, whole."""
    job, _, undisturbed = conversions[direction]
    few = job(tmp_path / "log" / "out")
    few = few._replace(**{"unit_bytes": 10**9} if direction == "import" else {"max_shard_bytes": 10**9})

    def old(folder: Path) -> tuple[Path, dict[str, str]]:
        folder.mkdir()
        out = Path(shutil.copytree(undisturbed, folder / "out"))
        (out / "notes.txt").write_text("of the old one")
        return out, checksums(out)

    out, _ = old(tmp_path / "log")
    log = tmp_path / "events"
    outcome = run(few, fault=partial(die_at, -1, out.parent, log), overwrite=True)
    assert outcome.error is None
    new = checksums(out)
    events = log.read_text().splitlines()
    first = next(i for i, line in enumerate(events) if line == f"os.rename\t{out}")
    for step in sorted({*range(first, first + 4), *range(first + 4, len(events), 6), len(events) - 1}):
        out, before = old(tmp_path / f"step-{step}")
        job = few._replace(out=str(out))
        killed = run(job, fault=partial(die_at, step, out.parent), overwrite=True)
        assert killed.exitcode == -signal.SIGKILL
        if step == first + 1:  # between the two renames both are complete, and neither is in place
            assert not out.exists()
            assert checksums(out.with_name(".out.old")) == before
            assert checksums(out.with_name(".out.partial")) == new
        else:
            assert checksums(out) == (before if step <= first else new), events[step]
        again = run(job, overwrite=True)
        assert again.error is None, events[step]
        assert checksums(out) == new
        assert siblings(out) == ["out"], events[step]
