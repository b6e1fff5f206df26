"""Workers, ranks and torchrun's agent that fail or are killed: no process stays behind, nothing is half made, and the
same call finishes it.

Each command runs in processes of its own, as a user's does; what finishes it runs in the test's.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from support.checkpoints import edit_tensors
from support.faults_runs import (
    ENVIRONMENT,
    TIMEOUT,
    Conversion,
    Job,
    checksums,
    convert,
    import_job,
    processes_with,
    siblings,
)

# A script that converts under torchrun, or with two workers, as the command does.
PROGRAM = """
import os, sys
from bridge.convert.hf_to_torch_dist import ImportJob
from bridge.convert.torch_dist_to_hf import ExportJob
from bridge.jobs.ranks import TorchrunRanks
from support.faults_runs import convert
if __name__ == "__main__":
    job = eval(sys.argv[1])
    with TorchrunRanks():
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
    assert convert(job(out)).reused > 0
    assert checksums(out) == expected
    assert siblings(out) == ["out"]


@pytest.mark.slow  # test_offline_runs has it at less cost
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
    assert convert(job(out)).reused > 0
    assert checksums(out) == expected
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
    convert(job(out))
    assert checksums(out) == expected
    assert siblings(out) == ["out"]
