"""Weights' gradients of all experts, added to their float32 sums by one kernel.

**Law.** For each expert, in place: total += grad^T x, of the rows that are its own; an expert may have none.

**Why.** cuBLAS multiplies for one expert at a time, and looks for an algorithm for each number of rows it has not seen,
which routed tokens hardly ever repeat. So 32 launches of a layer take longer on the processor than on the GPU.

Addresses of the sums and numbers of rows go to the GPU in one tensor. A program makes a tile of one expert's gradient
and adds it: of `total`, 4 bytes an element are read and written, once.
"""

# ruff: noqa: N803  (upper case: compile-time constants)

from collections.abc import Sequence
from itertools import accumulate

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
_MOST = 1 << 31  # elements of one expert, which 32 bits count
_HALF = (torch.bfloat16, torch.float16)


def add_weight_gradients(
    x: BFloat16[Tensor, "tokens in"] | Float16[Tensor, "tokens in"],
    grad: BFloat16[Tensor, "tokens out"] | Float16[Tensor, "tokens out"],
    total: Sequence[Float32[Tensor, "out in"]],
    rows: Sequence[int],
) -> None:
    """`total[e] += grad[of e].T @ x[of e]`, in place, for every expert e; products and sums are float32's.

    Args:
        x: the linear layers' inputs, the first expert's tokens first.
        grad: the gradients of their outputs, in the same order.
        total: each expert's sum to add to.
        rows: how many tokens each expert has.

    All must be contiguous and on one GPU, and rows a multiple of 16 bytes long (of 8 elements, `total` of 4).

    Raises:
        ValueError: one of them is not so; names it, and what was found.
    """
    out_features, in_features = total[0].shape
    _check(x, grad, total, rows)
    firsts = [0, *accumulate(rows)][:-1]
    table = torch.tensor([*(one.data_ptr() for one in total), *firsts, *rows]).to(x.device, non_blocking=True)
    tiles = triton.cdiv(out_features, OUT_BLOCK) * triton.cdiv(in_features, IN_BLOCK)
    _add(
        (tiles, len(rows), 1),
        (table, x, grad, total[0], len(rows), out_features, in_features),
        (OUT_BLOCK, IN_BLOCK, ROW_BLOCK, TALL),
        warps=WARPS,
        stages=STAGES,
    )


def _check(x: Tensor, grad: Tensor, total: Sequence[Tensor], rows: Sequence[int]) -> None:
    (out_features, in_features), tokens = total[0].shape, sum(rows)
    if x.dtype not in _HALF:
        raise ValueError(f"x must be {' or '.join(map(str, _HALF))}, found {x.dtype}")
    if len(total) != len(rows):
        raise ValueError(f"total and rows must be of as many experts, found {len(total)} and {len(rows)}")
    wanted = [
        ("x", x, (tokens, in_features), x.dtype),
        ("grad", grad, (tokens, out_features), x.dtype),
        *((f"total[{expert}]", one, (out_features, in_features), torch.float32) for expert, one in enumerate(total)),
    ]
    widest = max(in_features, out_features)
    if max(*rows, out_features) * widest >= _MOST:
        raise ValueError(
            f"an expert's tensors must have fewer than 2^31 elements, found {max(rows)} tokens of {widest}"
        )
    for name, one, shape, dtype in wanted:
        if one.shape != shape or one.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {shape}, found {one.dtype} {tuple(one.shape)}")
        if shape[1] * dtype.itemsize % _ALIGNMENT.value:
            raise ValueError(f"{name}: rows must be a multiple of 16 bytes long, found {shape[1]} elements of {dtype}")
        if not one.is_contiguous() or one.data_ptr() % _ALIGNMENT.value:
            raise ValueError(f"{name} must be contiguous, at an address that is a multiple of 16")


@Launcher
@triton.jit
def _add(
    table, x, grad, like, experts, out_features, in_features,
    OUT_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """A tile of one expert; `table` has the address of each total, its first token and the number of its tokens.

    `like` is a total, for its dtype.
    """
    expert = tl.program_id(1)
    rows = tl.load(table + 2 * experts + expert).to(tl.int32)
    if rows > 0:
        start = tl.load(table + experts + expert)
        x = tl.multiple_of(x + start * in_features, _ALIGNMENT)
        grad = tl.multiple_of(grad + start * out_features, _ALIGNMENT)
        total = tl.multiple_of(tl.load(table + expert).to(like.dtype), _ALIGNMENT)

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
