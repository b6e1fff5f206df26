"""The norms in C++ (`host.cpp`), for eager calls on a GPU, and what Python does in the first of them.

Where it cannot be built there is a warning, and `HeadNorm` runs in Python.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from compiled import cpp_build
from compiled.norm import launches
from compiled.norm.collectives import ProcessGroupInfo
from compiled.norm.spec import NormSpec
from compiled.triton_launch import Launch

SOURCE = Path(__file__).with_suffix(".cpp")

# Fields of Triton's metadata that are not zero for a kernel that needs more than a plain launch by the driver.
EXTRAS = (
    "global_scratch_size",
    "profile_scratch_size",
    "launch_cooperative_grid",
    "launch_pdl",
    "instrumentation_mode",
)


@cache
def head_norm(spec: NormSpec, ranks: ProcessGroupInfo, replicas: tuple[int, ...]) -> Callable[..., list[Tensor]] | None:
    """`HeadNorm.apply` in C++, its first three arguments given; it takes cos, sin, a list of weights, a list of inputs.

    None if it could not be built.
    """
    module = _built()
    if module is None:
        return None
    fill = (launches.fill_sums, launches.fill_outputs, _fill_gradients)
    return module.Norm(spec, ranks, list(replicas), *map(_telling, fill))


def _fill_gradients(
    grads: list[Tensor], saved: tuple[Any, ...], spec: NormSpec, targets: tuple[Any, ...]
) -> list[Launch]:
    """For C++, which has plain tuples."""
    return launches.fill_gradients(grads, launches.Saved(*saved), spec, launches.Targets(*targets))


def _built() -> ModuleType | None:
    instead = "Python launches their kernels, which is slower for few tokens and otherwise the same"
    return cpp_build.load_or_build(SOURCE, "the norms' C++ host code", instead)


# -------------------------------------------------------------------------------------------------------- what is kept


class Relaunch(NamedTuple):
    """What the driver needs to launch a compiled kernel again. Arguments are numbered with tuples flattened."""

    compiled: Any
    """Triton's, which unloads the function when it is freed."""
    function: int
    warps: int
    shared: int
    """Bytes of shared memory."""
    taken: list[int]
    """The numbers of the arguments that the kernel takes; the others were compiled into it."""
    values: list[int | None]
    """The arguments, each as the low bits of 64."""
    programs: int


def _telling(fill: Callable[..., list[Launch]]) -> Callable[..., list[Relaunch] | None]:
    """`fill`, which then returns what it launched in the driver's terms; None if not all of it can be launched so."""

    @wraps(fill)
    def told(*args: Any) -> list[Relaunch] | None:
        launches = fill(*args)
        return [_relaunch(launch) for launch in launches] if all(map(_is_plain, launches)) else None

    return told


def _is_plain(launch: Launch) -> bool:
    """Whether it is compiled at all and needs no scratch memory, clusters or instrumentation."""
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
