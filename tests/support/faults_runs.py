"""The offline import and export in processes that take milliseconds to start, and ways to make them fail.

Each run is a fork of a server that has imported and compiled everything (`faults_warm`).
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.forkserver import _forkserver
from pathlib import Path
from typing import Any, NamedTuple

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
from bridge.jobs.staging import Staging

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "PYTHONWARNINGS": "ignore",
    "CUDA_VISIBLE_DEVICES": "",  # it does not survive a fork
}
TIMEOUT = 120.0  # of what takes a fraction of a second on an idle machine
NOBODY = 65534

DIRECTIONS = ("import", "export")
Job = ImportJob | ExportJob
Fault = Callable[[], dict[str, Any]]
"""Called in the new process, before the run; what it returns are further options of the run."""

forks = get_context("forkserver")


class Conversion(NamedTuple):
    """One direction: what is converted, and what comes of it when nothing happens."""

    job: Callable[[Path], Job]
    expected: dict[str, str]
    undisturbed: Path


def import_job(source: Path, out: Path) -> ImportJob:
    """Into 15 files."""
    return ImportJob(str(source), str(out), unit_bytes=100_000)


def export_job(megatron: Path, source: Path, out: Path) -> ExportJob:
    """Into 14 files."""
    return ExportJob(str(megatron), str(out), source=str(source), max_shard_bytes=60_000)


@contextmanager
def warm_server(checkpoint: Path, *modules: str) -> Iterator[None]:
    """Runs start inside this block from a process that has imported `modules`, by default `faults_warm`."""
    environment = ENVIRONMENT | {"FAULTS_CHECKPOINT": str(checkpoint)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        _forkserver._stop()  # a process has one of these: another test's would have imported other things
        forks.set_forkserver_preload(["pytest", *(modules or ["support.faults_warm"]), "support.faults_runs"])
        start(ImportJob("/nowhere", "/nowhere/out")).outcome()
        yield
    finally:
        _forkserver._stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Outcome(NamedTuple):
    """`error` is (type, message) of what the run raised; nothing is known of one that was killed."""

    exitcode: int | None
    summary: Any
    error: tuple[str, str] | None


class Run(NamedTuple):
    """A process that is converting."""

    process: Any
    pipe: Connection

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        self.process.kill()

    def outcome(self) -> Outcome:
        """Waits; a run that hangs is killed, and `exitcode` is None."""
        self.process.join(TIMEOUT)
        exitcode = self.process.exitcode
        self.process.kill()
        self.process.join()
        try:
            summary, error = self.pipe.recv()
        except EOFError:
            summary, error = None, None
        return Outcome(exitcode, summary, error)


def convert(job: Job, **options: Any) -> Any:
    """Do what the job says."""
    return import_checkpoint(job, **options) if isinstance(job, ImportJob) else export_checkpoint(job, **options)


def fork(act: Callable, *args: Any) -> Run:
    """`act(pipe, *args)` in a process that the warm server forks; what it sends is received here."""
    ours, theirs = forks.Pipe(duplex=False)
    process = forks.Process(target=act, args=(theirs, *args))
    process.start()
    theirs.close()
    return Run(process, ours)


def start(job: Job, *, fault: Fault = dict, **options: Any) -> Run:
    """The run has begun, with everything imported, when this returns."""
    running = fork(_run, job, fault, options)
    running.pipe.recv()
    return running


def run(job: Job, *, fault: Fault = dict, **options: Any) -> Outcome:
    """A whole run."""
    return start(job, fault=fault, **options).outcome()


def call(act: Callable, *args: Any) -> Outcome:
    """A function in a process of its own."""
    return fork(_call, act, args).outcome()


def _call(pipe: Connection, act: Callable, args: tuple) -> None:
    try:
        pipe.send((act(*args), None))
    except BaseException as error:
        pipe.send((None, (type(error).__name__, "".join(traceback.format_exception(error)[-12:]))))


def _run(pipe: Connection, job: Job, fault: Fault, options: dict[str, Any]) -> None:
    pipe.send("started")
    try:
        pipe.send((convert(job, **options, **fault()), None))
    except Exception as error:
        pipe.send((None, (type(error).__name__, str(error))))


# -------------------------------------------------------------------------------------------------------------- faults


def small_files(nbytes: int) -> dict[str, Any]:
    """No file may grow beyond `nbytes`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    return {}


def nobody() -> dict[str, Any]:
    """Lose root's rights."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return {}


def after_units(count: int, act: Callable[[], object]) -> dict[str, Any]:
    """Do something between two units."""

    def track(units: Any, what: str, length: int) -> Iterator:
        for done, unit in enumerate(units):
            if done == count:
                act()
            yield unit

    return {"track": track}


def die_at(number: int, below: Path, log: Path | None = None) -> dict[str, Any]:
    """Killed just before the file system below a folder is changed for the `number`-th time."""
    seen = 0

    def audit(event: str, args: tuple) -> None:
        nonlocal seen
        path = _changed(event, args)
        if path is None or not path.startswith(str(below)):
            return
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        if log is not None:
            with log.open("a") as file:
                file.write(f"{event}\t{path}\n")

    sys.addaudithook(audit)
    return {}


def die_before_publishing() -> dict[str, Any]:
    """Everything is written, and nothing is in place."""
    Staging.publish = lambda self: os._exit(1)
    return {}


_EVENTS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1}  # and where the folder's descriptor stands


def _changed(event: str, args: tuple) -> str | None:
    """The path that is about to be changed."""
    if event == "open":
        path, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR) or (isinstance(mode, str) and mode[:1] in "wxa")
        return str(path) if writes else None
    if event not in _EVENTS:
        return None
    folder = args[_EVENTS[event]]
    return str(args[0]) if folder == -1 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{args[0]}"


# --------------------------------------------------------------------------------------------------------- what is left


def checksums(folder: Path) -> dict[str, str]:
    """Every file and folder, with the checksum of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def siblings(out: Path) -> list[str]:
    """What lies beside `out`, itself included."""
    return sorted(path.name for path in out.parent.iterdir())


def finished_files(out: Path) -> list[Path]:
    """What an interrupted run has recorded as finished: one file a unit."""
    partial_, journal = (out.with_name(f".{out.name}.{role}") for role in ("partial", "journal"))
    records = [json.loads(path.read_bytes()) for path in sorted(journal.glob("unit-*.json"))]
    return [partial_ / file for record in records for file in record["files"]]


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


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
