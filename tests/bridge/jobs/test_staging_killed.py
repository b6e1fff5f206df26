"""A staged folder whose run is killed: whole or absent at the target, and the same run again finishes it.

A helper process forks a run for each line it reads; the run is killed with SIGKILL before its n-th change to the disk
(sys.addaudithook reports each before it happens), or after some seconds.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support.checks import ROOT
from support.folders import contents

HELPER = """
import json, os, signal, sys, time
from pathlib import Path
from bridge.jobs.staging import Staging

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def write(out, value, kill_before):
    changes = 0
    def hook(event, args):
        nonlocal changes
        if event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            changes += 1
            if changes == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    done = 0
    with Staging(out, inputs={"value": value}, replaces=lambda _: True) as staged:
        if staged.published:
            staged.forget()
            return done
        for unit in range(4):
            with Staging.join(out, {"value": value}) as joined:
                if joined.finished(f"unit-{unit}") is None:
                    (joined.folder / f"file-{unit}").write_text(f"{value} {unit}")
                    joined.record(f"unit-{unit}", [f"file-{unit}"], unit)
                    done += 1
        (staged.folder / "done").write_text(value)
        staged.publish()
    return done

for line in sys.stdin:
    job = json.loads(line)
    begin = time.monotonic()
    child = os.fork()
    if not child:
        os._exit(100 + write(job["out"], job["value"], job.get("kill_before")))
    if "kill_after" in job:
        time.sleep(job["kill_after"])
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begin}), flush=True)
"""
WHOLE = {
    value: {"done": value.encode()} | {f"file-{unit}": f"{value} {unit}".encode() for unit in range(4)}
    for value in ("old", "new")
}


@pytest.fixture(scope="module")
def helper() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", HELPER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


def run(helper: subprocess.Popen, out: Path, value: str = "new", **job: Any) -> dict[str, Any]:
    helper.stdin.write(json.dumps({"out": str(out), "value": value, **job}) + "\n")
    helper.stdin.flush()
    return json.loads(helper.stdout.readline())


@pytest.fixture(scope="module")
def old_folder(helper: subprocess.Popen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("old") / "out"
    assert run(helper, out, "old")["code"] == 104
    return out


def state_after_kill(out: Path, old: bool) -> str:
    """Where things stand: nothing complete is lost, nothing is at the target that is not complete."""
    if out.exists():
        found = contents(out)
        assert found in WHOLE.values()
        return found["done"].decode()
    if not old:
        return "absent"
    assert contents(out.with_name(".out.old")) == WHOLE["old"]
    assert contents(out.with_name(".out.partial")) == WHOLE["new"]
    return "between the renames"


def finish_after_kill(helper: subprocess.Popen, out: Path) -> int:
    """The same command again: the result is that of an undisturbed run. Returns how many units it had to do."""
    code = run(helper, out)["code"]
    assert contents(out) == WHOLE["new"]
    assert os.listdir(out.parent) == ["out"]
    return code - 100


@pytest.mark.parametrize("old", [False, True])
def test_killed_before_each_change_to_the_disk(
    helper: subprocess.Popen, old_folder: Path, tmp_path: Path, old: bool
) -> None:
    states, redone = [], []
    for number in count(1):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if old:
            shutil.copytree(old_folder, out)
        code = run(helper, out, kill_before=number)["code"]
        states.append(state_after_kill(out, old))
        if code == 104:
            break
        assert code == -signal.SIGKILL
        redone.append(finish_after_kill(helper, out))
    met = ["old", "between the renames", "new"] if old else ["absent", "new"]
    assert list(dict.fromkeys(states)) == met, "each state was met, in this order"
    assert states.count(met[0]) > 15
    before_publishing = redone[: states.index(met[1])]
    assert sorted(before_publishing, reverse=True) == before_publishing, "the later it was killed, the less was redone"
    assert set(before_publishing) == {4, 3, 2, 1, 0}


def test_killed_at_random_moments(helper: subprocess.Popen, old_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    seconds = run(helper, tmp_path / "whole/out")["seconds"]
    moments = random.Random(0)
    killed = 0
    for number in range(200):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        old = number % 2 == 0
        if old:
            shutil.copytree(old_folder, out)
        answer = run(helper, out, kill_after=moments.uniform(0, seconds))
        state_after_kill(out, old)
        if answer["code"] == -signal.SIGKILL:
            killed += 1
            finish_after_kill(helper, out)
        if killed == 16:
            return
    pytest.fail(f"only {killed} of 200 runs were killed before they were done")
