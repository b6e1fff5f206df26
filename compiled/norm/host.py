"""`norm_host.cpp`, which makes the norms' eager calls on a GPU cheap for the processor: its build and its first calls.

It is built when it is first needed, with the C++ compiler that torch finds, into the folder of torch's extensions, once
for each version of it and of torch. Where that fails there is a warning, and the norms are called from Python.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import struct
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled.norm import launches
from compiled.norm.collectives import ProcessGroupInfo
from compiled.norm.spec import NormSpec
from compiled.triton_launch import Launch

SOURCE = Path(__file__).with_suffix(".cpp")
_ONE_BUILD = threading.Lock()

# What Triton's metadata says of a kernel that wants more than the driver's plain launch.
EXTRAS = (
    "global_scratch_size",
    "profile_scratch_size",
    "launch_cooperative_grid",
    "launch_pdl",
    "instrumentation_mode",
)


@cache
def head_norm(spec: NormSpec, ranks: ProcessGroupInfo, replicas: tuple[int, ...]) -> Callable[..., list[Tensor]] | None:
    """`HeadNorm.apply` with the first three arguments given: takes cos, sin, the weights and the inputs, as lists.

    None: it could not be built.
    """
    module = _built()
    if module is None:
        return None
    fill = (launches.fill_sums, launches.fill_outputs, launches.fill_gradients)
    return module.Norm(spec, ranks, list(replicas), *map(_telling, fill))


# ------------------------------------------------------------------------------------------------------------ the build


def library() -> Path:
    """Where it is, once it is built."""
    from torch.utils.cpp_extension import get_default_build_root

    made_of = SOURCE.read_bytes() + f"{torch.__version__} {sys.version} {platform.machine()}".encode()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root, f"minimax_m2_norm_host_{hashlib.sha256(made_of).hexdigest()[:16]}.so")


def _built() -> ModuleType | None:
    with _ONE_BUILD:
        return _load_or_build()


@cache
def _load_or_build() -> ModuleType | None:
    if torch.version.hip:
        return None
    path = library()
    try:
        try:
            return _load(path)
        except ImportError:  # not there, or it does not fit this machine
            path.unlink(missing_ok=True)
            return _build(path)
    except (RuntimeError, OSError, ImportError) as error:
        warnings.warn(
            f"the norms' C++ host code could not be built or loaded, so Python launches their kernels, which is slower "
            f"for few tokens and otherwise the same. It takes a C++ compiler, ninja, Python's headers, and a folder "
            f"{path.parent} that can be written to. {error}",
            stacklevel=2,
        )
        return None


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(path: Path) -> ModuleType:
    """In a folder of its own: processes that start together all build, wait for no lock, and see no half a file.

    The first one's stays, or the last one's where there are no hard links, and what others have loaded serves them
    until they end.
    """
    from torch.utils import cpp_extension

    path.parent.mkdir(parents=True, exist_ok=True)
    # Errors of cleaning up: NFS does not let a library go that is loaded.
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder, _ninja_on_path():
        module = cpp_extension.load(
            path.stem, [str(SOURCE)], extra_cflags=["-O2"], build_directory=folder, with_cuda=False
        )
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


# -------------------------------------------------------------------------------------------------------- what is kept


class Relaunch(NamedTuple):
    """What the driver needs to launch a compiled kernel again. Arguments are counted with tuples flattened."""

    compiled: Any
    """Triton's; the function is gone when this is."""
    function: int
    warps: int
    shared: int
    """Bytes of shared memory."""
    taken: list[int]
    """Which arguments the kernel takes: the others were compiled into it."""
    values: list[int | None]
    """The arguments, each as the low bits of 64."""
    programs: int


def _telling(fill: Callable[..., list[Launch]]) -> Callable[..., list[Relaunch] | None]:
    """`fill`, with what it launched in the driver's terms: None if not all of it can be launched so."""

    @wraps(fill)
    def told(*args: Any) -> list[Relaunch] | None:
        launches = fill(*args)
        return [_relaunch(launch) for launch in launches] if all(map(_is_plain, launches)) else None

    return told


def _is_plain(launch: Launch) -> bool:
    """Compiled at all, and wants no scratch memory, clusters or instrumentation."""
    if launch.compiled is None:
        return False
    metadata = launch.compiled.metadata
    return metadata.num_ctas == 1 and not any(getattr(metadata, extra, 0) for extra in EXTRAS)


def _relaunch(launch: Launch) -> Relaunch:
    compiled, arguments = launch.compiled, list(_flat(launch.arguments))
    types = list(_flat(compiled.src.signature.values()))[: len(arguments)]
    taken = [place for place, kind in enumerate(types) if kind != "constexpr"]
    values = [_bits(x) for x in arguments]
    metadata = compiled.metadata
    return Relaunch(compiled, compiled.function, metadata.num_warps, metadata.shared, taken, values, launch.programs)


def _flat(nested: Iterable[Any]) -> Iterator[Any]:
    for x in nested:
        if isinstance(x, tuple):
            yield from _flat(x)
        else:
            yield x


def _bits(x: Any) -> int | None:
    if isinstance(x, float):
        return int.from_bytes(struct.pack("<f", x), "little")
    return x.data_ptr() if isinstance(x, Tensor) else x
