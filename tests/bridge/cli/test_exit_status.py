"""How the command ends when it is told to, or by a bug of ours, and what it leaves behind then."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.folders import contents
from typer.testing import CliRunner

import bridge.convert.hf_to_torch_dist
import bridge.memory_plan.plan
import bridge.proof.inspect_checkpoint
from bridge.cli import app

COMMAND = str(Path(sys.executable).with_name("minimax-m2"))
ROOT = Path(__file__).parents[3]
CUDA_REMARK = "No CUDA runtime is found"


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """The temporary folder is the test's own, and torch finds a compiler for GPUs."""
    (tmp_path / "cuda").mkdir(exist_ok=True)
    (tmp_path / "temporary").mkdir(exist_ok=True)
    found = {"TMPDIR": str(tmp_path / "temporary"), "CUDA_HOME": str(tmp_path / "cuda"), "PYTHONPATH": str(ROOT)}
    return os.environ | found | {"CUDA_VISIBLE_DEVICES": ""} | more


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_demo_that_is_told_to_go_leaves_nothing(tmp_path: Path, number: int, status: int) -> None:
    temporary = tmp_path / "temporary"
    run = subprocess.Popen([COMMAND, "demo"], env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(temporary.glob("minimax-m2-*/source/*")))
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == status, said
    assert not list(temporary.glob("minimax-m2-*"))
    assert CUDA_REMARK not in said


def children(process: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name_and_more = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(name_and_more[1]) == process and name_and_more[0] != "Z":
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow  # three times the start of a command and its workers; test_processes_killed.py has conversions killed
def test_an_import_that_is_told_to_go_is_taken_up_again(imported: Path, checkpoint: Path, tmp_path: Path) -> None:
    """No worker goes on, what was finished is kept, and torch's remark is not shown by workers either."""
    out = tmp_path / "out"
    words = [COMMAND, "import", str(checkpoint), str(out), "--workers", "2"]
    run = subprocess.Popen(words, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob(".out.journal/inputs.json")))
    wait_for(lambda: len(children(run.pid)) > 2 or run.poll() is not None)
    workers = children(run.pid)
    run.terminate()
    assert run.wait(60) in (-signal.SIGTERM, 143)
    wait_for(lambda: not any(Path(f"/proc/{worker}/exe").exists() for worker in workers))
    assert not out.exists()
    again = subprocess.run(words, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert CUDA_REMARK not in again.stderr
    assert {name for name in contents(out) if "distcp" not in name} == {
        name for name in contents(imported) if "distcp" not in name
    }
    assert not list(tmp_path.glob(".out*"))


def test_other_warnings_of_torchs_are_not_hidden(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from bridge.jobs.third_party_logs import drop_remark_on_gpus

    log = logging.getLogger("torch.utils.cpp_extension")
    drop_remark_on_gpus()
    with caplog.at_level(logging.WARNING, log.name):
        log.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "x")
        log.warning("the compiler is too old")
    assert [record.getMessage() for record in caplog.records] == ["the compiler is too old"]


BUGS = {
    "inspect": (bridge.proof.inspect_checkpoint, "inspect_checkpoint", []),
    "plan": (bridge.memory_plan.plan, "plan", ["--gpus", "8"]),
    "import": (bridge.convert.hf_to_torch_dist, "import_checkpoint", ["out"]),
}


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("y\x1b[31m"), AssertionError(), RuntimeError("z\nerror: w")]
)
@pytest.mark.parametrize("verb", BUGS)
def test_a_bug_says_that_it_is_one(
    checkpoint: Path, verb: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a traceback and status 2; 1 would say that something differs."""
    module, name, more = BUGS[verb]

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, name, fail)
    result = CliRunner().invoke(app, [verb, str(checkpoint), *more])
    assert result.exit_code == 2
    *traceback, last = result.stderr.splitlines()
    assert last.startswith(f"error: a bug in minimax-m2 ({type(error).__name__})")
    assert traceback[0] == "Traceback (most recent call last):"
    assert any("in fail" in line for line in traceback)
    assert "\x1b" not in result.stderr


def test_an_interrupted_run_says_so_by_its_status(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bridge.proof.inspect_checkpoint, "inspect_checkpoint", interrupt)
    assert CliRunner().invoke(app, ["inspect", str(checkpoint)]).exit_code == 130


def test_wrong_options_are_no_bug() -> None:
    result = CliRunner().invoke(app, ["plan", "x", "--gpus", "many"])
    assert result.exit_code == 2
    assert "bug" not in result.output
