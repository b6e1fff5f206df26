"""A step of Adam over many tensors: gradients clipped, weights moved, and rounded for the model, by one kernel.

**Law.** In place, of each element, in float32; t is the number of the step, the first is 1 (`torch.optim.AdamW`):

    g = scale grad
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    w = w - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w)

and the model's bfloat16 parameter is w, rounded once. If `scale` is NaN, nothing is changed.

**Why.** One after another, scaling moves 8 bytes an element, Adam 28 and rounding 6; here it is 30 in all. And `scale`
is on the GPU, so that the processor need not wait for the norm of the gradient before it starts the step.
"""

# ruff: noqa: N803  (upper case: compile-time constants)

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, chain
from operator import or_
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float32
from torch import Tensor

from compiled.triton_launch import Launcher

BLOCK, BLOCKS, WARPS = 1024, 4, 4  # elements at a time, and how many times, of a program
_FLOAT32 = tl.constexpr(tl.pointer_type(tl.float32))
_BFLOAT16 = tl.constexpr(tl.pointer_type(tl.bfloat16))
_ALIGNMENT = 16  # bytes of an address, elements of a length
_COLUMNS = tl.constexpr(6)  # of the table: five addresses and a length


class AdamTensors(NamedTuple):
    """A weight and what moves it; all are contiguous and of one length, and float32 but for `rounded`."""

    grad: Tensor
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    rounded: Tensor | None = None
    """The model's bfloat16 parameter; None if `weight` itself is the model's."""


def adam_step(
    tensors: Sequence[AdamTensors],
    scale: Float32[Tensor, ""],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Move the weights once, in place, with their averages; gradients are left as they are.

    Args:
        tensors: all on one device.
        scale: what gradients are multiplied by, such as a clipping coefficient; there, too. NaN: change nothing.
        lr: learning rate.
        betas: of the averages of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: decoupled, so multiplied by the learning rate alone.
        step: 1 the first time.

    Raises:
        ValueError: a tensor is of another dtype, length or device, or not contiguous, `scale` is no scalar of float32,
            or `step` is less than 1; names it, and what was found. Nothing was changed.
    """
    _check(tensors, scale, step)
    given = lr, *(1 - beta for beta in betas), *(1 - beta**step for beta in betas), eps, weight_decay
    numbers = tuple(map(float, given))  # or an integer would be another kernel's
    rows = [_row(one) for one in tensors if one.weight.numel()]
    for aligned in (True, False):
        some = [row for row in rows if _aligned(row) == aligned]
        if some:
            _launch(some, scale, numbers, aligned)


def _row(tensors: AdamTensors) -> list[int]:
    """Addresses, 0 where there is none, and the length."""
    return [0 if one is None else one.data_ptr() for one in tensors] + [tensors.weight.numel()]


def _aligned(row: list[int]) -> bool:
    """Whether all of it can be read and written 16 bytes at a time."""
    return reduce(or_, row) % _ALIGNMENT == 0


def _launch(rows: list[list[int]], scale: Tensor, numbers: tuple[float, ...], aligned: bool) -> None:
    ends = [*accumulate(triton.cdiv(row[-1], BLOCK * BLOCKS) for row in rows)]  # programs of a row and those before it
    table = torch.tensor([*chain.from_iterable(rows), *ends], pin_memory=scale.is_cuda)
    arguments = table.to(scale.device, non_blocking=True), scale
    _move((ends[-1], 1, 1), arguments, (BLOCK, BLOCKS, aligned), free=(len(rows), *numbers), warps=WARPS)


def _check(tensors: Sequence[AdamTensors], scale: Tensor, step: int) -> None:
    if scale.dtype != torch.float32 or scale.dim():
        raise ValueError(f"scale must be torch.float32 and a scalar, found {scale.dtype} {tuple(scale.shape)}")
    if step < 1:
        raise ValueError(f"step must be 1 or more, found {step}")
    for number, row in enumerate(tensors):
        length = row.weight.numel()
        for name, one in zip(AdamTensors._fields, row, strict=True):
            if one is None:
                continue
            dtype = torch.bfloat16 if name == "rounded" else torch.float32
            if one.dtype != dtype or one.numel() != length or one.device != scale.device or not one.is_contiguous():
                raise ValueError(
                    f"tensors[{number}].{name} must be {dtype}, contiguous, of {length} elements, on {scale.device}, "
                    f"found {one.dtype}, strides {one.stride()}, {one.numel()} elements, on {one.device}"
                )


@Launcher
@triton.jit(do_not_specialize=["tensors"])
def _move(
    tensors, lr, one_minus_beta1, one_minus_beta2, bias_correction1, bias_correction2, eps, weight_decay, table, scale,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A part of one tensor, which is found by bisection of the ends."""
    program = tl.program_id(0)
    coefficient = tl.load(scale)
    if coefficient == coefficient:  # not NaN
        ends = table + tensors * _COLUMNS
        low = 0
        high = tensors
        while low < high:
            middle = (low + high) // 2
            before = tl.load(ends + middle) <= program
            low = tl.where(before, middle + 1, low)
            high = tl.where(before, high, middle)
        row = table + low * _COLUMNS
        grad = tl.load(row).to(_FLOAT32)
        weight = tl.load(row + 1).to(_FLOAT32)
        exp_avg = tl.load(row + 2).to(_FLOAT32)
        exp_avg_sq = tl.load(row + 3).to(_FLOAT32)
        address = tl.load(row + 4)
        rounded = address.to(_BFLOAT16)
        length = tl.load(row + 5)
        if ALIGNED:
            grad = tl.multiple_of(grad, 16)
            weight = tl.multiple_of(weight, 16)
            exp_avg = tl.multiple_of(exp_avg, 16)
            exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
            rounded = tl.multiple_of(rounded, 16)
            length = tl.multiple_of(length, 16)
        first = (program - tl.load(ends + low - 1, mask=low > 0, other=0)) * (BLOCK * BLOCKS)
        for block in range(BLOCKS):
            i = first + block * BLOCK + tl.arange(0, BLOCK)
            here = i < length
            g = tl.load(grad + i, mask=here, other=0.0) * coefficient
            m = tl.load(exp_avg + i, mask=here, other=0.0)
            v = tl.load(exp_avg_sq + i, mask=here, other=0.0)
            w = tl.load(weight + i, mask=here, other=0.0)
            m += one_minus_beta1 * (g - m)  # of one constant, whose rounding is all that its own is off
            v += one_minus_beta2 * (g * g - v)
            root = tl.sqrt_rn(tl.div_rn(v, bias_correction2)) + eps
            w -= lr * (tl.div_rn(tl.div_rn(m, bias_correction1), root) + weight_decay * w)
            tl.store(exp_avg + i, m, mask=here)
            tl.store(exp_avg_sq + i, v, mask=here)
            tl.store(weight + i, w, mask=here)
            if address != 0:
                tl.store(rounded + i, w, mask=here)
