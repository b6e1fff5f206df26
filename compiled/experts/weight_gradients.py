"""Weights' gradients of all experts, added to their float32 sums by one kernel.

**Law.** For each expert, in place: total += grad^T x, of the rows that are its own; an expert may have none.

**Why.** cuBLAS multiplies for one expert at a time, and looks for an algorithm for each number of rows it has not seen,
which routed tokens hardly ever repeat. So 32 launches of a layer take longer on the processor than on the GPU.

Addresses and numbers of rows go to the GPU in one tensor. A program makes a tile of one expert's gradient and adds it:
of `total`, 4 bytes an element are read and written, once.
"""

# ruff: noqa: N803  (upper case: compile-time constants)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float16, Float32
from torch import Tensor

from compiled.triton_launch import Launcher

OUT_BLOCK, IN_BLOCK, ROW_BLOCK = 128, 128, 64  # of a program: the tile, and rows at a time
WARPS, STAGES = 4, 3
TALL = 8  # tiles beside each other that are made one after another, since they read the same columns of x
_ALIGNMENT = tl.constexpr(16)
_MOST = 1 << 31  # elements, which 32 bits count
_HALF = (torch.bfloat16, torch.float16)


def add_weight_gradients(
    x: Sequence[BFloat16[Tensor, "_ in"] | Float16[Tensor, "_ in"]],
    grad: Sequence[BFloat16[Tensor, "_ out"] | Float16[Tensor, "_ out"]],
    total: Sequence[Float32[Tensor, "out in"]],
) -> None:
    """`total[e] += grad[e].T @ x[e]`, in place, for every expert e; products and sums are float32's.

    Args:
        x: each expert's tokens, its linear layer's input.
        grad: the gradient of that layer's output, as many rows.
        total: the sum to add to.

    All must be contiguous and on one GPU, and rows a multiple of 16 bytes long (of 8 elements, `total` of 4).

    Raises:
        ValueError: one of them is not so; names it, and what was found.
    """
    out_features, in_features = total[0].shape
    _check(x, grad, total)
    rows = [one.shape[0] for one in x]
    table = [*(one.data_ptr() for of_all in (x, grad, total) for one in of_all), *rows]
    tiles = triton.cdiv(out_features, OUT_BLOCK) * triton.cdiv(in_features, IN_BLOCK)
    told = torch.tensor(table).to(total[0].device, non_blocking=True)
    _add(
        (tiles, len(rows), 1),
        (told, x[0], total[0], len(rows), out_features, in_features),
        (OUT_BLOCK, IN_BLOCK, ROW_BLOCK, TALL),
        warps=WARPS,
        stages=STAGES,
    )


def _check(x: Sequence[Tensor], grad: Sequence[Tensor], total: Sequence[Tensor]) -> None:
    (out_features, in_features), half = total[0].shape, x[0].dtype
    if half not in _HALF:
        raise ValueError(f"x[0] must be {' or '.join(map(str, _HALF))}, found {half}")
    widths = {
        "x": (x, in_features, half),
        "grad": (grad, out_features, half),
        "total": (total, in_features, torch.float32),
    }
    if not len(x) == len(grad) == len(total):
        raise ValueError(f"x, grad and total must be of as many experts, found {len(x)}, {len(grad)} and {len(total)}")
    for name, (tensors, width, dtype) in widths.items():
        if width * dtype.itemsize % _ALIGNMENT.value:
            raise ValueError(f"{name}: rows must be a multiple of 16 bytes long, found {width} elements of {dtype}")
        for expert, one in enumerate(tensors):
            wanted = total[0].shape if name == "total" else (x[expert].shape[0], width)
            if one.shape != wanted or one.dtype != dtype:
                found = f"{one.dtype} {tuple(one.shape)}"
                raise ValueError(f"{name}[{expert}] must be {dtype} {tuple(wanted)}, found {found}")
            if one.numel() >= _MOST:
                raise ValueError(f"{name}[{expert}] must have fewer than 2^31 elements, found {tuple(one.shape)}")
            if not one.is_contiguous() or one.data_ptr() % _ALIGNMENT.value:
                raise ValueError(f"{name}[{expert}] must be contiguous, at an address that is a multiple of 16")


@Launcher
@triton.jit
def _add(
    table, like, sums, experts, out_features, in_features,
    OUT_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """A tile of one expert; `table` has the addresses of x, grad and total of each, and the rows.

    `like` is an x and `sums` a total, for their dtypes.
    """
    expert = tl.program_id(1)
    rows = tl.load(table + 3 * experts + expert).to(tl.int32)
    if rows > 0:
        x = tl.multiple_of(tl.load(table + expert).to(like.dtype), _ALIGNMENT)
        grad = tl.multiple_of(tl.load(table + experts + expert).to(like.dtype), _ALIGNMENT)
        total = tl.multiple_of(tl.load(table + 2 * experts + expert).to(sums.dtype), _ALIGNMENT)

        down, across = tl.cdiv(out_features, OUT_BLOCK), tl.cdiv(in_features, IN_BLOCK)
        band = tl.program_id(0) // (TALL * across)
        height = tl.minimum(down - band * TALL, TALL)
        within = tl.program_id(0) % (TALL * across)
        o = (band * TALL + within % height) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
        i = within // height * IN_BLOCK + tl.arange(0, IN_BLOCK)
        in_out, in_in = o < out_features, i < in_features

        sum = tl.zeros((OUT_BLOCK, IN_BLOCK), dtype=tl.float32)
        for first in range(0, rows, ROW_BLOCK):
            row = first + tl.arange(0, ROW_BLOCK)
            live = (row < rows)[:, None]
            g = tl.load(grad + row[:, None] * out_features + o[None, :], mask=live & in_out[None, :], other=0.0)
            a = tl.load(x + row[:, None] * in_features + i[None, :], mask=live & in_in[None, :], other=0.0)
            sum = tl.dot(tl.trans(g), a, sum)
        at = total + o[:, None] * in_features + i[None, :]
        here = in_out[:, None] & in_in[None, :]
        tl.store(at, tl.load(at, mask=here) + sum, mask=here)
