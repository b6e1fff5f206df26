"""A conversion as a command: processes that are all of its own, workers or torchrun's ranks, as a user's are."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from support.checks import ROOT
from support.conversions import Job
from support.forks import TIMEOUT

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "PYTHONWARNINGS": "ignore",
    "CUDA_VISIBLE_DEVICES": "",
}

# Converts under torchrun, or with some workers, as `minimax-m2 import` and `export` do.
PROGRAM = """
import json, os, sys
from bridge.convert.hf_to_torch_dist import ImportJob
from bridge.convert.torch_dist_to_hf import ExportJob
from support.conversions import convert
if __name__ == "__main__":
    job = {"ImportJob": ImportJob, "ExportJob": ExportJob}[sys.argv[1]](**json.loads(sys.argv[2]))
    try:
        os.write(2, f"rank {os.environ.get('RANK')} is {os.getpid()}\\n".encode())  # at once: ranks share it
        convert(job, workers=int(sys.argv[3]))
    except (ValueError, OSError) as error:
        os.write(2, f"refused: {error}\\n".encode())
        sys.exit(2)
"""


class Command(NamedTuple):
    """A command in processes that are all of its own, its output in a file."""

    process: subprocess.Popen
    log: Path
    mark: str  # of its processes: an environment variable that they inherit

    def finish(self) -> tuple[int, str]:
        """Exit status and output; nothing may be left running."""
        status = self.process.wait(TIMEOUT)
        until = time.monotonic() + 10
        while processes_with(self.mark) and time.monotonic() < until:
            time.sleep(0.1)
        assert not processes_with(self.mark), "processes were left behind"
        return status, self.log.read_text()


def start_command(job: Job, folder: Path, *, ranks: int = 0, workers: int = 1) -> Command:
    (folder / "program.py").write_text(PROGRAM)
    mark = f"COMMAND_IN={folder}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    what = [type(job).__name__, json.dumps(job._asdict()), str(workers)]
    command = [sys.executable, *launcher, str(folder / "program.py"), *what]
    environment = os.environ | ENVIRONMENT | dict([mark.split("=")])
    with (folder / "log").open("w") as log:
        return Command(subprocess.Popen(command, env=environment, stdout=log, stderr=log), folder / "log", mark)


def wait_for_a_unit(out: Path, running: Command) -> None:
    """Until some unit is finished."""
    until = time.monotonic() + TIMEOUT
    while not list(out.with_name(".out.journal").glob("unit-*.json")):
        assert time.monotonic() < until, "waited in vain"
        assert running.process.poll() is None, running.log.read_text()
        time.sleep(0.002)


def pid_of(rank: int, running: Command) -> int:
    """As the rank itself has said, or will in a moment."""
    until = time.monotonic() + TIMEOUT
    while not (said := re.search(rf"^rank {rank} is (\d+)$", running.log.read_text(), re.MULTILINE)):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)
    return int(said[1])


def processes_with(variable: str) -> list[int]:
    """Processes that were started with this environment variable."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
        except OSError:
            continue
    return found
