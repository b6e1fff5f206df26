"""C++ sources that lie beside these modules, built when they are first needed and kept.

Each is built once for each version of it, of torch and of Python, by the C++ compiler that torch finds, into the folder
of torch's extensions. Of processes that start together one builds and the others wait for it. Where the build fails
there is a warning, and the caller does without.
"""

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TextIO

import torch

_ONE_THREAD = threading.Lock()


def load_or_build(source: Path, what: str, instead: str) -> ModuleType | None:
    """The extension module of a C++ source; built if there is none yet.

    None: it could be neither loaded nor built. A warning then says so of `what`, and what happens `instead`.
    """
    with _ONE_THREAD:
        return _loaded_or_built(source, what, instead)


def library(source: Path) -> Path:
    """Where the built library is kept."""
    from torch.utils.cpp_extension import get_default_build_root

    made_of = source.read_bytes() + f"{torch.__version__} {sys.version} {platform.machine()}".encode()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root, f"minimax_m2_{source.stem}_{hashlib.sha256(made_of).hexdigest()[:16]}.so")


@cache
def _loaded_or_built(source: Path, what: str, instead: str) -> ModuleType | None:
    if torch.version.hip:
        return None
    path = library(source)
    try:
        try:
            return _load(path)
        except ImportError:  # not there, or it does not fit this machine
            return _build_once(source, path)
    except (RuntimeError, OSError, ImportError) as error:
        warnings.warn(
            f"{what} could not be built or loaded, so {instead}. It takes a C++ compiler, ninja, Python's headers, and "
            f"a folder {path.parent} that can be written to. {error}",
            stacklevel=2,
        )
        return None


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # Python has a loader for names that end in .so
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build_once(source: Path, path: Path) -> ModuleType:
    """Build, unless another process does so now: then wait, and load what it built or fail as it failed.

    The lock only saves work; a build is safe without it. It ends with the process that holds it, however that ends. To
    those that wait, the lock's file tells why the build failed; who comes later makes a new file, and tries again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with lock.open("a+") as file:
        _wait_for(file)
        try:
            return _load(path)
        except ImportError:
            path.unlink(missing_ok=True)
        file.seek(0)
        if failure := file.read():
            raise RuntimeError(f"Another process tried at the same time: {failure}")
        try:
            return _build(source, path)
        except Exception as error:
            file.write(str(error))
            raise
        finally:
            lock.unlink(missing_ok=True)


def _wait_for(file: TextIO) -> None:
    with suppress(OSError):  # a file system without locks: each process builds
        fcntl.flock(file, fcntl.LOCK_EX)


def _build(source: Path, path: Path) -> ModuleType:
    """Build in a folder of its own, so that no process sees half a file, with the lock or without.

    Of several builds the first one's library stays, or the last one's where there are no hard links; what others have
    loaded serves them until they end.
    """
    from torch.utils import cpp_extension

    # Errors of cleaning up: NFS does not let a library go that is loaded.
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder, _ninja_on_path():
        module = cpp_extension.load(
            path.stem, [str(source)], extra_cflags=["-O2"], build_directory=folder, with_cuda=False
        )
        assert isinstance(module, ModuleType)  # torch has loaded it from its file
        assert module.__file__ is not None
        try:
            os.link(module.__file__, path)
        except FileExistsError:
            pass
        except OSError:
            copy = shutil.copy(module.__file__, Path(folder, "copy"))
            os.replace(copy, path)
    return module


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """torch looks for ninja there, and not where pip put it, beside a Python whose environment is not activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
