"""Triton kernels whose compiled forms are looked up here, which takes less processor time than Triton's own launch."""

from typing import Any, NamedTuple

from torch import Tensor


class Launch(NamedTuple):
    """A launch that was made. `compiled` is Triton's; None in Triton's interpreter, which compiles nothing."""

    compiled: Any
    arguments: tuple[Any, ...]
    programs: int


class Launcher:
    """Calls `kernel(*free, *arguments, *constants)`; `free` are numbers that the kernel is not specialized on.

    Triton compiles a kernel anew for other constants, types of arguments, integers, and addresses that are or are not
    multiples of 16; these are the key here. Triton's own launch works out the same and more, each time.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        *,
        free: tuple[float, ...] = (),
        warps: int = 4,
        stages: int = 3,
    ) -> Launch:
        key = warps, stages, constants, _described(arguments)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[grid](*free, *arguments, *constants, num_warps=warps, num_stages=stages)
            if compiled is not None:  # as in Triton's interpreter
                self.compiled[key] = compiled
        else:
            compiled[grid](*free, *arguments, *constants)
        return Launch(compiled, (*free, *arguments), grid[0])


def _described(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, each tensor replaced by what Triton compiles for: dtype, alignment and device."""
    return tuple([
        x if type(x) is int
        else _described(x) if type(x) is tuple
        else (x.dtype, x.data_ptr() % 16 == 0, x.get_device()) if isinstance(x, Tensor)
        else x
        for x in arguments
    ])  # fmt: skip
