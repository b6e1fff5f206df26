"""`cpp_build`: what is built is kept; processes that start together build once; what happens where nothing is built."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.checks import ROOT

from compiled import cpp_build
from compiled.norm import host

# An empty module in C: pybind11 takes seconds to compile.
QUICK = """
#include <Python.h>
#define TEXT(name) #name
#define TEXT_OF(macro) TEXT(macro)
#define INIT(name) PyInit_##name
#define INIT_OF(macro) INIT(macro)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, TEXT_OF(TORCH_EXTENSION_NAME)};
PyMODINIT_FUNC INIT_OF(TORCH_EXTENSION_NAME)() { return PyModule_Create(&definition); }
"""
PROGRAM = """
import sys
from pathlib import Path
from compiled import cpp_build
source = Path(sys.argv[1])
print(cpp_build.library(source))
print(cpp_build.load_or_build(source, "the code", "Python launches"))
"""
# A compiler that notes each compilation of a source, and does it when a file is there that allows it.
COMPILER = """#!/bin/sh
case " $* " in *" -c "*)
  echo $$ >> {log}
  while [ ! -e {allowed} ]; do sleep 0.1; done
  {fail};;
esac
exec c++ "$@"
"""


def start(folder: Path, source: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that loads or builds `source` in a folder, and says so; warnings included."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(source)],
        cwd=ROOT,
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said_by(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def quick(tmp_path) -> Path:
    source = tmp_path / "quick.cpp"
    source.write_text(QUICK)
    return source


class SlowCompiler:
    """Compiles when it is allowed to; `fail` is what it does then instead."""

    def __init__(self, folder: Path, fail: str = ":") -> None:
        self.log, self.allowed, self.path = folder / "compilations", folder / "allowed", folder / "slow-c++"
        self.path.write_text(COMPILER.format(log=self.log, allowed=self.allowed, fail=fail))
        self.path.chmod(0o755)

    def compilations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


def all_waiting(folder: Path, count: int) -> bool:
    """Whether `count` processes have the lock's file open."""
    locks = list(folder.glob("*.lock"))
    return (
        bool(locks) and len([pid for pid in os.listdir("/proc") if pid.isdigit() and has_open(pid, locks[0])]) == count
    )


def has_open(pid: str, path: Path) -> bool:
    try:
        return any(link.resolve() == path for link in Path("/proc", pid, "fd").iterdir())
    except OSError:  # it has ended, or is another user's
        return False


def test_what_is_built_is_loaded_again():
    built = host._built()
    library = cpp_build.library(host.SOURCE)
    assert library.exists()
    said = said_by(start(library.parent, host.SOURCE, CXX="no such compiler"))
    assert f"<module '{built.__name__}' from '{library}'>" in said
    assert "could not be built" not in said


def test_what_cannot_be_loaded_is_built_anew(tmp_path, quick):
    """Without ninja on the path: it is found where pip puts it, beside a Python whose environment is not activated."""
    tools, folder = tmp_path / "tools", tmp_path / "built"
    tools.mkdir()
    folder.mkdir()
    for name in ("c++", "g++", "as", "ld", "which", "sh", "uname"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    said = said_by(start(folder, quick, CXX="no such compiler"))
    library = Path(next(line for line in said.splitlines() if line.startswith(str(folder))))
    library.write_bytes(b"from a disk that was full")
    said = said_by(start(folder, quick, PATH=str(tools)))
    assert f"<module '{library.stem}'" in said
    assert library.stat().st_size > 10_000
    assert list(folder.iterdir()) == [library]


@pytest.mark.parametrize("lacking", ["hard links", "locks"])
def test_file_systems_that_lack_something(lacking, quick, tmp_path, monkeypatch):
    """It is built all the same, and is what the next process loads."""
    folder = tmp_path / "built"
    folder.mkdir()
    quick.write_text(f"{QUICK}// without {lacking}")  # torch renames what this process has built before
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOTSUP, "not on this file system")

    if lacking == "locks":  # for us alone: torch takes locks of its own
        monkeypatch.setattr(cpp_build, "fcntl", SimpleNamespace(flock=refuse, LOCK_EX=fcntl.LOCK_EX))
    else:
        monkeypatch.setattr(os, "link", refuse)
    library = cpp_build.library(quick)
    assert cpp_build._build_once(quick, library).__name__ == library.stem
    assert cpp_build._load(library).__name__ == library.stem
    assert list(folder.iterdir()) == [library]


def test_no_compiler_is_said_and_leaves_nothing(tmp_path):
    said = said_by(start(tmp_path, host.SOURCE, CXX="no such compiler"))
    assert "\nNone\n" in said
    assert "the code could not be built or loaded, so Python launches" in said
    assert "no such compiler" in said
    assert list(tmp_path.iterdir()) == []


def test_processes_that_start_together_build_once(tmp_path, quick):
    compiler, folder = SlowCompiler(tmp_path), tmp_path / "built"
    processes = [start(folder, quick, CXX=str(compiler.path)) for _ in range(3)]
    wait_until(lambda: all_waiting(folder, 3))
    compiler.allowed.touch()
    for process in processes:
        said = said_by(process)
        assert f"<module '{cpp_build.library(quick).stem}'" in said
        assert "could not be built" not in said
    assert compiler.compilations() == 1
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_a_build_that_fails_is_tried_once(tmp_path, quick):
    compiler, folder = SlowCompiler(tmp_path, fail="echo no room on the disk; exit 1"), tmp_path / "built"
    processes = [start(folder, quick, CXX=str(compiler.path)) for _ in range(2)]
    wait_until(lambda: all_waiting(folder, 2))
    compiler.allowed.touch()
    for process in processes:
        said = said_by(process)
        assert "\nNone\n" in said
        assert "no room on the disk" in said
    assert compiler.compilations() == 1
    assert list(folder.iterdir()) == []


def test_another_process_builds_when_the_first_is_killed(tmp_path, quick):
    compiler, folder = SlowCompiler(tmp_path), tmp_path / "built"
    first = start(folder, quick, CXX=str(compiler.path))
    wait_until(lambda: compiler.compilations() == 1)
    second = start(folder, quick, CXX=str(compiler.path))
    wait_until(lambda: all_waiting(folder, 2))
    assert compiler.compilations() == 1
    first.send_signal(signal.SIGKILL)
    wait_until(lambda: compiler.compilations() == 2)
    compiler.allowed.touch()
    assert f"<module '{cpp_build.library(quick).stem}'" in said_by(second)
    first.communicate(timeout=60)
    assert not list(folder.glob("*.lock"))
