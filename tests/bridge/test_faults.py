"""Whatever happens to an offline import or export, its output is whole or absent, and the same call finishes it.

Killed at any moment, out of disk, without permission, sources that change underneath, a worker or rank that fails.
"""

import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints import edit_config, edit_tensors
from faults_flips import flip_and_read
from faults_runs import (
    ENVIRONMENT,
    TIMEOUT,
    Job,
    after_units,
    call,
    die_at,
    die_before_publishing,
    finished_files,
    flip,
    nobody,
    processes_with,
    run,
    siblings,
    small_files,
    snapshot,
    start,
    warm_server,
)

from bridge.offline_export import ExportJob
from bridge.offline_import import ImportJob
from bridge.target_config import FP8_SECTION

DIRECTIONS = ("import", "export")
SMALLER_BLOCKS = {**FP8_SECTION, "weight_block_size": [64, 64]}


class Conversion(NamedTuple):
    """One direction: what is converted, and what comes of it when nothing happens."""

    job: Callable[[Path], Job]
    expected: dict[str, str]
    undisturbed: Path


@pytest.fixture(scope="module")
def conversions(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Conversion]]:
    """Import into 15 files and export into 14, in processes that fork from a warm one."""
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs = {"import": partial(import_job, checkpoint), "export": partial(export_job, folder / "import", checkpoint)}
    with warm_server(checkpoint):
        for direction, job in jobs.items():
            assert run(job(folder / direction)).error is None
        yield {name: Conversion(job, snapshot(folder / name), folder / name) for name, job in jobs.items()}


def import_job(source: Path, out: Path) -> ImportJob:
    return ImportJob(str(source), str(out), unit_bytes=100_000)


def export_job(megatron: Path, source: Path, out: Path) -> ExportJob:
    return ExportJob(str(megatron), str(out), source=str(source), max_shard_bytes=60_000)


def given_folder(job: Job) -> str:
    """What is converted."""
    return job.source if isinstance(job, ImportJob) else job.megatron


def given(job: Job, folder: Path) -> Job:
    """The same conversion of another folder."""
    if isinstance(job, ImportJob):
        return job._replace(source=str(folder))
    return job._replace(megatron=str(folder))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a run writes; it is alone in its folder."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "out"


# ------------------------------------------------------------------------------------------------------------- kill -9


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
            assert snapshot(out) == conversion.expected
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
        assert snapshot(out) == conversion.expected
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
        return out, snapshot(out)

    out, _ = old(tmp_path / "log")
    log = tmp_path / "events"
    outcome = run(few, fault=partial(die_at, -1, out.parent, log), overwrite=True)
    assert outcome.error is None
    new = snapshot(out)
    events = log.read_text().splitlines()
    first = next(i for i, line in enumerate(events) if line == f"os.rename\t{out}")
    for step in sorted({*range(first, first + 4), *range(first + 4, len(events), 6), len(events) - 1}):
        out, before = old(tmp_path / f"step-{step}")
        job = few._replace(out=str(out))
        killed = run(job, fault=partial(die_at, step, out.parent), overwrite=True)
        assert killed.exitcode == -signal.SIGKILL
        if step == first + 1:  # between the two renames both are complete, and neither is in place
            assert not out.exists()
            assert snapshot(out.with_name(".out.old")) == before
            assert snapshot(out.with_name(".out.partial")) == new
        else:
            assert snapshot(out) == (before if step <= first else new), events[step]
        again = run(job, overwrite=True)
        assert again.error is None, events[step]
        assert snapshot(out) == new
        assert siblings(out) == ["out"], events[step]


# ------------------------------------------------------------------------------------------------- the disk, and rights


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB, where an import or export needs more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip(f"no right to mount a small file system: {mount.stderr.decode()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_disk_full(conversions: dict[str, Conversion], small_disk: Path, direction: str):
    job, expected, _ = conversions[direction]
    out = small_disk / "out"
    outcome = run(job(out))
    assert outcome.exitcode == 0
    kind, message = outcome.error
    assert kind == "OSError"
    assert "No space left on device" in message
    assert str(out) in message
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    again = run(job(out))
    assert again.error is None
    assert again.summary.reused > 0
    assert snapshot(out) == expected
    assert siblings(out) == ["out"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_file_larger_than_allowed(conversions: dict[str, Conversion], out: Path, direction: str):
    job, expected, _ = conversions[direction]
    outcome = run(job(out), fault=partial(small_files, 60_000))
    assert outcome.exitcode == 0
    kind, message = outcome.error
    assert kind == "OSError"
    assert "File too large" in message
    assert str(out) in message
    assert not out.exists()
    assert run(job(out)).error is None
    assert snapshot(out) == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_permission_denied(conversions: dict[str, Conversion], direction: str):
    """pytest's folders are for one user alone, so another one needs copies elsewhere."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    job, *_ = conversions[direction]
    with tempfile.TemporaryDirectory() as public:
        Path(public).chmod(0o755)
        source, locked = Path(public, "source"), Path(public, "locked")
        shutil.copytree(given_folder(job(locked)), source)
        locked.mkdir()
        given = {"megatron": str(source), "source": None, "scales": "fresh"}
        again = job(locked / "out")._replace(**given if direction == "export" else {"source": str(source)})
        kind, message = run(again, fault=nobody).error
        assert kind == "PermissionError"
        assert str(locked) in message
        assert siblings(locked / "out") == []
        secret = next(source.rglob("*.safetensors" if direction == "import" else "*.distcp"))
        secret.chmod(0o600)
        locked.chmod(0o777)
        kind, message = run(again, fault=nobody).error
        assert kind in ("PermissionError", "ValueError")
        assert str(secret) in message


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_read_only_disk(conversions: dict[str, Conversion], small_disk: Path, direction: str):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    kind, message = run(conversions[direction].job(small_disk / "out")).error
    assert kind == "OSError"
    assert "Read-only file system" in message
    assert str(small_disk) in message


# --------------------------------------------------------------------------------- sources that change, units that fail


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def replace(path: Path) -> None:
    """As a download that starts again does: another file of the same size."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[::-1])


CHANGES = {"truncated": truncate, "replaced": replace, "gone": Path.unlink}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_file_changes_midway(
    conversions: dict[str, Conversion], tmp_path: Path, out: Path, direction: str, change: str
):
    job, expected, _ = conversions[direction]
    copy = Path(shutil.copytree(given_folder(job(out)), tmp_path / "copy"))
    changed = given(job(out), copy)
    victim = max(path for path in copy.rglob("*") if path.suffix in (".safetensors", ".distcp"))
    outcome = run(changed, fault=partial(after_units, 2, partial(CHANGES[change], victim)))
    assert outcome.exitcode == 0
    kind, message = outcome.error
    assert kind == "ValueError"
    assert str(victim) in message
    assert not out.exists()
    again = run(changed)
    assert again.error is not None
    assert victim.name in again.error[1]
    assert not out.exists()
    victim.unlink(missing_ok=True)
    shutil.copy2(Path(given_folder(job(out)), victim.relative_to(copy)), victim)
    restored = run(changed)
    assert restored.error is None
    assert snapshot(out) == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_config_changes_between_two_runs(conversions: dict[str, Conversion], tmp_path: Path, out: Path, direction: str):
    """What an earlier run made from another config.json is not taken over."""
    job, _, _ = conversions[direction]
    copy = Path(shutil.copytree(given_folder(job(out)), tmp_path / "copy"))
    if direction == "import":
        changed, folder = given(job(out), copy), copy
    else:
        changed, folder = given(job(out), copy)._replace(source=None, scales="fresh"), copy / "hugging_face"
    assert run(changed, fault=die_before_publishing).exitcode == 1
    assert len(finished_files(out)) >= 14
    edit_config(folder, lambda config: config.update(rope_theta=10_000, quantization_config=SMALLER_BLOCKS))
    if direction == "import":
        edit_config(folder, lambda config: config.update(quantization_config=FP8_SECTION))
    assert run(changed).error is None
    whole = changed._replace(out=str(out.with_name("whole")))
    assert run(whole).error is None
    assert snapshot(out) == snapshot(Path(whole.out))


# A script that converts under torchrun, or with two workers, as the command does.
PROGRAM = """
import os, sys
from bridge.offline_import import ImportJob
from bridge.offline_export import ExportJob
from bridge.team import Ranks
from faults_runs import convert
if __name__ == "__main__":
    job = eval(sys.argv[1])
    with Ranks():
        try:
            os.write(2, f"rank {os.environ.get('RANK')} is {os.getpid()}\\n".encode())  # at once: ranks share it
            convert(job, workers=int(sys.argv[2]))
        except (ValueError, OSError) as error:
            os.write(2, f"refused: {error}\\n".encode())
            sys.exit(2)
"""


class Real(NamedTuple):
    """A command in processes that are all of its own, its output in a file."""

    process: subprocess.Popen
    log: Path
    mark: str

    def finish(self) -> tuple[int, str]:
        """Exit status and output; nothing may be left running."""
        status = self.process.wait(TIMEOUT)
        until = time.monotonic() + 10
        while processes_with(self.mark) and time.monotonic() < until:
            time.sleep(0.1)
        assert not processes_with(self.mark), "processes were left behind"
        return status, self.log.read_text()


def real(job: Job, folder: Path, *, ranks: int = 0, workers: int = 1) -> Real:
    (folder / "program.py").write_text(PROGRAM)
    mark = f"FAULTS_RUN={folder}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, str(folder / "program.py"), repr(job), str(workers)]
    environment = os.environ | ENVIRONMENT | dict([mark.split("=")])
    with (folder / "log").open("w") as log:
        return Real(subprocess.Popen(command, env=environment, stdout=log, stderr=log), folder / "log", mark)


def wait_for_a_unit(out: Path, running: Real) -> None:
    """Until some unit is finished."""
    until = time.monotonic() + TIMEOUT
    while not list(out.with_name(".out.journal").glob("unit-*.json")):
        assert time.monotonic() < until, "waited in vain"
        assert running.process.poll() is None, running.log.read_text()
        time.sleep(0.002)


def pid_of(rank: int, running: Real) -> int:
    """As the rank itself has said, or will in a moment."""
    until = time.monotonic() + TIMEOUT
    while not (said := re.search(rf"^rank {rank} is (\d+)$", running.log.read_text(), re.MULTILINE)):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)
    return int(said[1])


def spoilt_source(source: Path, folder: Path) -> tuple[Path, str]:
    """A copy with a NaN scale, which is found when that tensor is read."""
    copy = Path(shutil.copytree(source, folder / "spoilt"))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight_scale_inv"
    edit_tensors(copy, lambda tensors: tensors[name].fill_(float("nan")))
    return copy, name


@pytest.mark.slow  # an error of a unit is tested in one process and under torchrun too
def test_a_unit_fails_in_a_worker(checkpoint: Path, tmp_path: Path, out: Path):
    copy, name = spoilt_source(checkpoint, tmp_path)
    status, said = real(import_job(copy, out), tmp_path, workers=2).finish()
    assert status == 2
    assert [line for line in said.splitlines() if line.startswith("refused")] == [
        line for line in said.splitlines() if name in line
    ]
    assert "refused" in said
    assert not out.exists()


@pytest.mark.parametrize("victim", ["worker", pytest.param("parent", marks=pytest.mark.slow)])
def test_killed_with_two_workers(conversions: dict[str, Conversion], tmp_path: Path, out: Path, victim: str):
    job, expected, _ = conversions["import"]
    running = real(job(out), tmp_path, workers=2)
    wait_for_a_unit(out, running)
    workers = [
        pid for pid in processes_with(running.mark) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(workers[0] if victim == "worker" else running.process.pid, signal.SIGKILL)
    status, said = running.finish()
    if victim == "worker":
        assert status == 2
        assert "a worker process died" in said
    else:
        assert status == -signal.SIGKILL
    assert not out.exists()
    again = run(job(out))
    assert again.error is None
    assert again.summary.reused > 0
    assert snapshot(out) == expected
    assert siblings(out) == ["out"]


@pytest.mark.slow  # test_offline has it at less cost
def test_a_rank_fails(checkpoint: Path, tmp_path: Path, out: Path):
    copy, name = spoilt_source(checkpoint, tmp_path)
    status, said = real(import_job(copy, out), tmp_path, ranks=2).finish()
    refused = [line for line in said.splitlines() if line.startswith("refused")]
    assert status
    assert len(refused) == 2
    assert refused[0] == refused[1]
    assert name in refused[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("direction", "rank"),
    [
        ("import", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("import", 0), ("export", 0), ("export", 1))),
    ],
)
def test_a_rank_is_killed(conversions: dict[str, Conversion], tmp_path: Path, out: Path, direction: str, rank: int):
    job, expected, _ = conversions[direction]
    running = real(job(out), tmp_path, ranks=2)
    wait_for_a_unit(out, running)
    os.kill(pid_of(rank, running), signal.SIGKILL)
    status, _ = running.finish()
    assert status
    assert not out.exists()
    again = run(job(out))
    assert again.error is None
    assert again.summary.reused > 0
    assert snapshot(out) == expected
    assert siblings(out) == ["out"]


def test_torchruns_agent_is_killed(conversions: dict[str, Conversion], tmp_path: Path, out: Path):
    """Ranks that nobody watches over end, also one that waits for another."""
    job, expected, _ = conversions["import"]
    running = real(job(out), tmp_path, ranks=2)
    wait_for_a_unit(out, running)
    waiting, stopped = (pid_of(rank, running) for rank in range(2))
    os.kill(stopped, signal.SIGSTOP)
    os.kill(running.process.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while waiting in processes_with(running.mark):
        assert time.monotonic() < until, "rank 0 waits for a rank that does nothing"
        time.sleep(0.1)
    os.kill(stopped, signal.SIGCONT)
    status, _ = running.finish()
    assert status == -signal.SIGKILL
    assert not out.exists()
    assert run(job(out)).error is None
    assert snapshot(out) == expected
    assert siblings(out) == ["out"]


# ------------------------------------------------------------------------------------------------- a byte that is wrong


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_flipped_bit_is_noticed(conversions: dict[str, Conversion], tmp_path: Path, direction: str):
    """In every written file: reading fails, or something differs. Bits without effect are printed, none a tensor's."""
    copy = Path(shutil.copytree(conversions[direction].undisturbed, tmp_path / "copy"))
    outcome = call(flip_and_read, direction, copy)
    assert outcome.error is None, outcome.error[1]
    print(outcome.summary)
    assert outcome.summary.refused
    assert outcome.summary.differing
    assert not [at for at in outcome.summary.unnoticed if at.in_a_tensor]
