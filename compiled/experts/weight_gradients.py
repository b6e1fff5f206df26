"""Weights' gradients of all experts, added to their float32 sums by one kernel.

**Law.** For each expert, in place: total += grad^T x, of the rows that are its own; an expert may have none.

**Why.** cuBLAS multiplies for one expert at a time, and must be told by the processor how many rows each has. A
processor that is to tell waits for the GPU, and the GPU for it after that; here numbers of rows stay on the GPU.

A program makes a tile of one expert's gradient and sends it to where the sums are kept, which adds it: nothing of
`total` is read by a program, and none waits for it. Each element is added to once, so that the sums are the same each
time.
"""

# ruff: noqa: N803  (upper case: compile-time constants)

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float16, Float32, Int32
from torch import Tensor

from compiled.triton_launch import Launcher

OUT_BLOCK, IN_BLOCK, ROW_BLOCK = 128, 256, 64  # of a program: the tile, and rows at a time
WARPS, STAGES = 8, 4
TALL = 8  # tiles beside each other that are made one after another, since they read the same columns of x
ROOMY = (9, 10)  # major compute capabilities of GPUs with room for a tile
_ALIGNMENT = tl.constexpr(16)
_MANY = 1 << 31  # elements, which 32 bits do not count
_HALF = (torch.bfloat16, torch.float16)


def add_weight_gradients(
    x: BFloat16[Tensor, "tokens in"] | Float16[Tensor, "tokens in"],
    grad: BFloat16[Tensor, "tokens out"] | Float16[Tensor, "tokens out"],
    total: Float32[Tensor, "experts out in"],
    ends: Int32[Tensor, "experts"],
) -> None:
    """`total[e] += grad[of e].T @ x[of e]`, in place, for every expert e; products and sums are float32's.

    Args:
        x: the linear layers' inputs, the first expert's tokens first.
        grad: the gradients of their outputs, in the same order.
        total: each expert's sum to add to.
        ends: how many tokens each expert and those before it have, as `torch.nn.functional.grouped_mm` wants them. Not
            looked at by the processor: they must not fall, and not end beyond the tokens.

    All must be contiguous and on one device, and rows a multiple of 16 bytes long (of 8 elements, `total` of 4). A tile
    takes 192 KB of shared memory, which GPUs of compute capability 9 and 10 have.

    Raises:
        ValueError: one of them is not so; names it, and what was found.
    """
    experts, out_features, in_features = total.shape
    _check(x, grad, total, ends)
    _check_room(x.device)
    many = max(len(x), out_features) * max(in_features, out_features) >= _MANY
    tiles = triton.cdiv(out_features, OUT_BLOCK) * triton.cdiv(in_features, IN_BLOCK)
    _add(
        (tiles, experts, 1),
        (ends, x, grad, total, out_features, in_features),
        (OUT_BLOCK, IN_BLOCK, ROW_BLOCK, TALL, many),
        warps=WARPS,
        stages=STAGES,
    )


def _check_room(device: torch.device) -> None:
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device))[0] not in ROOMY:
        raise ValueError(
            f"x is on {torch.cuda.get_device_name(device)}, of compute capability {found}, which has no 192 KB of "
            "shared memory for a tile; capability 9 or 10 has, and Transformer Engine's grouped layers need less"
        )


def _check(x: Tensor, grad: Tensor, total: Tensor, ends: Tensor) -> None:
    (experts, out_features, in_features), tokens = total.shape, len(x)
    if x.dtype not in _HALF:
        raise ValueError(f"x must be {' or '.join(map(str, _HALF))}, found {x.dtype}")
    wanted = [
        ("x", x, (tokens, in_features), x.dtype),
        ("grad", grad, (tokens, out_features), x.dtype),
        ("total", total, (experts, out_features, in_features), torch.float32),
        ("ends", ends, (experts,), torch.int32),
    ]
    for name, one, shape, dtype in wanted:
        if one.shape != shape or one.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {shape}, found {one.dtype} {tuple(one.shape)}")
        if one.device != x.device:
            raise ValueError(f"{name} must be where x is, on {x.device}, found {one.device}")
        if not one.is_contiguous():
            raise ValueError(f"{name} must be contiguous, found strides {one.stride()} of shape {tuple(one.shape)}")
        if one is not ends and (shape[-1] * dtype.itemsize | one.data_ptr()) % _ALIGNMENT.value:
            raise ValueError(
                f"{name}: rows must be a multiple of 16 bytes long, at an address that is one, found {shape[-1]} "
                f"elements of {dtype} at {one.data_ptr()}"
            )


@Launcher
@triton.jit
def _add(
    ends, x, grad, total, out_features, in_features,
    OUT_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, TALL: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """A tile of one expert, of the rows between the end before its own and its own; `MANY`: counted in 64 bits."""
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    rows = tl.load(ends + expert) - start
    if rows > 0:
        down, across = tl.cdiv(out_features, OUT_BLOCK), tl.cdiv(in_features, IN_BLOCK)
        band = tl.program_id(0) // (TALL * across)
        height = tl.minimum(down - band * TALL, TALL)
        within = tl.program_id(0) % (TALL * across)
        o = (band * TALL + within % height) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
        i = within // height * IN_BLOCK + tl.arange(0, IN_BLOCK)
        in_out, in_in = o < out_features, i < in_features

        x = tl.multiple_of(x + start.to(tl.int64) * in_features, _ALIGNMENT)
        grad = tl.multiple_of(grad + start.to(tl.int64) * out_features, _ALIGNMENT)
        sum = tl.zeros((OUT_BLOCK, IN_BLOCK), dtype=tl.float32)
        for first in range(0, rows, ROW_BLOCK):
            row = first + tl.arange(0, ROW_BLOCK)
            live = (row < rows)[:, None]
            if MANY:
                row = row.to(tl.int64)
            g = tl.load(grad + row[:, None] * out_features + o[None, :], mask=live & in_out[None, :], other=0.0)
            a = tl.load(x + row[:, None] * in_features + i[None, :], mask=live & in_in[None, :], other=0.0)
            sum = tl.dot(tl.trans(g), a, sum)
        total = tl.multiple_of(total + expert.to(tl.int64) * out_features * in_features, _ALIGNMENT)
        if MANY:
            o = o.to(tl.int64)
        at = total + o[:, None] * in_features + i[None, :]
        here = in_out[:, None] & in_in[None, :]
        tl.atomic_add(at, sum, mask=here, sem="relaxed")
