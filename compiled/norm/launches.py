"""The launches of `norm.kernels` that fill the results of `steps_triton`: grids, compile-time constants, arguments.

Each function returns the launches that it made, in order; without tokens there are none. Triton is imported at the
first call.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from compiled.norm.spec import NormSpec, parts_of
from compiled.triton_launch import Launch


class Tuning(NamedTuple):
    """The first four: how many elements of a tile each warp of a kernel holds, which is 32 times what a thread holds.

    The last two are for the backward kernel, whose programs stay resident: warps on each multiprocessor, and tokens
    that a program has loaded or is loading.
    """

    square_sums: int
    forward: int
    apply: int
    backward: int
    warps_a_multiprocessor: int
    stages: int


# The fastest of those tried on one H200.
PLAIN = Tuning(square_sums=1024, forward=1024, apply=512, backward=512, warps_a_multiprocessor=16, stages=4)
ROTATING = Tuning(square_sums=1024, forward=2048, apply=512, backward=1024, warps_a_multiprocessor=8, stages=4)


def fill_sums(inputs: list[Tensor], spec: NormSpec, sums: Tensor) -> list[Launch]:
    from compiled.norm.kernels import square_sums_kernel

    tokens, batch = _tokens(sums)
    if not tokens:
        return []
    parts = parts_of(inputs, spec)[: len(spec.terms)]
    sizes = _sizes(parts, None, spec)
    warps = sizes.warps(PLAIN.square_sums)
    return [square_sums_kernel((tokens, 1, 1), (_views(parts), sums, batch), sizes, free=(tokens,), warps=warps)]


def fill_outputs(
    inputs: list[Tensor],
    weights: list[Tensor],
    sums: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    spec: NormSpec,
    ys: list[Tensor],
    rstd: Tensor,
) -> list[Launch]:
    from compiled.norm.kernels import forward_kernel

    tokens, batch = _tokens(rstd)
    if not tokens:
        return []
    parts = parts_of(inputs, spec)
    sizes = _sizes(parts, cos, spec)
    arguments = (
        _views(parts), _views(ys), tuple(weights), sums, rstd, _table(cos, sin), batch,
        spec.terms[0], spec.terms[-1], spec.eps,
    )  # fmt: skip
    warps = sizes.warps(_tuning(cos).forward)
    return [forward_kernel((tokens, 1, 1), arguments, sizes, free=(tokens,), warps=warps)]


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    inputs: list[Tensor]
    weights: list[Tensor]
    rstd: Tensor
    cos: Tensor | None
    sin: Tensor | None


class Targets(NamedTuple):
    """What a step of the backward pass fills; it reads `coupling` (C) if it makes `dxs` alone."""

    dxs: list[Tensor] | None
    dw: Tensor | None
    coupling: Tensor | None


def fill_gradients(grads: list[Tensor], saved: Saved, spec: NormSpec, targets: Targets) -> list[Launch]:
    """The whole backward pass (without `coupling`), its sums (without `dxs`), or its last step (without `dw`).

    In the first launch, if there is a second, `programs` is the number for very many tokens: `host.cpp` takes the
    smaller of it and the tokens of a later call.
    """
    from compiled.norm.kernels import add_partials_kernel, backward_kernel

    inputs, weights, rstd, cos, sin = saved
    dxs, dw, coupling = targets
    tokens, batch = _tokens(rstd)
    if not tokens:
        if dw is not None:
            dw.zero_()
        return []
    parts = parts_of(inputs, spec)
    if dxs is None:
        parts, grads = parts[: len(spec.terms)], grads[: len(spec.terms)]
    sizes, tuning = _sizes(parts, cos, spec), _tuning(cos)
    warps = sizes.warps(tuning.apply if dw is None else tuning.backward)
    programs, stages, partials = tokens, 1, None
    if dw is not None:
        resident = max(1, tuning.warps_a_multiprocessor // warps) * _multiprocessors(rstd.device)
        programs, stages = min(tokens, resident), tuning.stages
        partials = dw.new_empty(programs, dw.numel(), dtype=torch.float32)
    arguments = (
        _views(grads), _views(parts), None if dxs is None else _views(parts_of(dxs, spec)), tuple(weights),
        partials, rstd, coupling, _table(cos, sin), batch, spec.terms[0], spec.terms[-1],
    )  # fmt: skip
    launch = backward_kernel((programs, 1, 1), arguments, (*sizes, stages), free=(tokens,), warps=warps)
    if dw is None:
        return [launch]
    width, rows, columns = dw.numel(), 64, 32
    grid = (-(-width // columns), 1, 1)
    addition = add_partials_kernel(grid, (partials, dw), (width, rows, columns), free=(programs,))
    return [launch._replace(programs=resident), addition]


def _views(parts: list[Tensor]) -> tuple[tuple[Tensor, *tuple[int, ...]], ...]:
    """Each tensor with its strides over seq, batch, and groups (or heads); copied if its last axis is not dense."""
    dense = [x if x.stride(-1) == 1 else x.contiguous() for x in parts]
    return tuple([(x, *x.stride()[:3]) for x in dense])


def _table(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, int, int] | None:
    """cos and sin with their strides over seq and batch."""
    if cos is None:
        return None
    cos, sin = cos.contiguous(), sin.contiguous()  # pyright: ignore[reportOptionalMemberAccess]  # given with cos
    return cos, sin, cos.stride(0), cos.stride(1) if cos.dim() == 3 else 0


def _tokens(sums: Tensor) -> tuple[int, int]:
    """seq * batch, and batch."""
    _, seq, batch = sums.shape
    return seq * batch, batch


class Sizes(NamedTuple):
    """The kernels' compile-time constants, in their order.

    Query heads, query heads of a group, key heads, value heads, channels of a head, half of the channels that rotate;
    then powers of two that hold all heads, that half, and the channels that do not rotate.
    """

    Q: int
    PER_GROUP: int
    K: int
    V: int
    DIM: int
    HALF: int
    BLOCK: int
    HALF_BLOCK: int
    REST_BLOCK: int

    def warps(self, elements_a_warp: int) -> int:
        return min(16, max(1, self.BLOCK * _power_of_two(self.DIM) // elements_a_warp))


def _sizes(parts: list[Tensor], cos: Tensor | None, spec: NormSpec) -> Sizes:
    dim, half = spec.head_dim, 0 if cos is None else cos.shape[-1]
    _, _, groups, width = parts[0].shape
    query, key, value = [groups * (width // dim), *[x.shape[2] for x in parts[1:]], 0, 0][:3]
    blocks = [_power_of_two(n) for n in (query + key + value, max(1, half), max(1, dim - 2 * half))]
    return Sizes(query, width // dim, key, value, dim, half, *blocks)


def _tuning(cos: Tensor | None) -> Tuning:
    return PLAIN if cos is None else ROTATING


def _power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
