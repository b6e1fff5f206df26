"""An import or export killed at random moments: its output is whole or absent, and the same call finishes it.

`tests/bridge/jobs/test_staging_killed.py` kills before each change to the disk, also while a folder is replaced.
"""

import random
import shutil
import signal
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from support.conversions import DIRECTIONS, Conversion, run, start
from support.faults import flip
from support.folders import checksums, finished_files, siblings

REUSED = 5  # runs that must have found finished files


class Tally(NamedTuple):
    killed: int
    reused: int
    damaged: int
    finished_by_the_killed: int


def kill_and_finish(conversion: Conversion, folder: Path, kills: int, seed: str) -> Tally:
    """Kill runs, once or several times each, and finish them; some after a file that was finished is damaged.

    More than `kills`, where disks are so slow that most runs are killed before a file is finished.
    """
    chance = random.Random(seed)
    seconds = statistics.median(duration(conversion, folder / f"timed-{trial}") for trial in range(3))
    killed = reused = damaged = early = 0
    while killed < kills or (reused < REUSED and killed < 4 * kills):
        out = folder / "alone" / "out"
        out.parent.mkdir()
        for _ in range(chance.choice([1, 1, 2, 3])):
            victim = start(conversion.job(out))
            victim.kill_after(chance.uniform(0, seconds))
            killed += victim.outcome().exitcode == -signal.SIGKILL
            if out.exists():
                break
        if out.exists():  # the kill came after the last rename
            early += 1
        else:
            finished, spoil = finished_files(out), chance.random() < 0.3
            spoil = spoil or (not damaged and len(finished) > 1)  # one is, whatever chance says; others are reused
            if spoil and finished:
                file = chance.choice(finished)
                flip(file, chance.randrange(file.stat().st_size), chance.randrange(8))
                damaged += 1
            summary = run(conversion.job(out)).get()
            assert summary.reused == len(finished) - bool(spoil and finished)
            assert siblings(out) == ["out"]
            reused += summary.reused > 0
        assert checksums(out) == conversion.expected
        shutil.rmtree(out.parent)
    return Tally(killed, reused, damaged, early)


def duration(conversion: Conversion, out: Path) -> float:
    """Of an undisturbed run, in seconds."""
    began = time.monotonic()
    run(conversion.job(out)).get()
    return time.monotonic() - began


@pytest.mark.parametrize("kills", [30, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_at_random_moments(conversions: dict[str, Conversion], tmp_path: Path, direction: str, kills: int):
    tally = kill_and_finish(conversions[direction], tmp_path, kills, f"{direction} {kills}")
    print(direction, tally)
    assert tally.killed >= kills
    assert tally.reused >= REUSED
    assert tally.damaged >= 1
