"""Triton kernels of the block scales: a program is a strip of one block, so that its scale is one number.

The grid is (column blocks, strips of row blocks, experts), counted on the grid of the scales: a slice that starts
inside a block (`row_offset`, `col_offset` elements after its start) only masks off what lies before it. Tensors are
[experts, rows, cols] of any strides, `*_at`.

By hand, because Inductor reached 94 % of the bandwidth of a copy only with every size a constant, at one compilation a
shape, and 5 to 29 % with free sizes (one H200, torch 2.11). Triton compiles once, and again for each pattern of sizes,
strides and offsets that are multiples of 16 or 1. float8 needs compute capability 8.9.
"""

# ruff: noqa: N803  (upper case: compile-time constants)

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIP, WARPS = 32, 4  # rows of a program, and its warps
_WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


def launch(
    kernel: triton.JITFunction,
    source: Tensor,
    scale_inv: Tensor,
    result: Tensor,
    damaged: Tensor | None,
    block_size: int,
    row_offset: int,
    col_offset: int,
    wide: torch.dtype,
) -> None:
    """`kernel` from source to result, both [experts, rows, cols]; products and quotients are formed in `wide`."""
    experts, rows, cols = source.shape
    _, row_blocks, col_blocks = scale_inv.shape
    width = triton.next_power_of_2(block_size)
    strip = min(STRIP, width)
    kernel[(col_blocks, row_blocks * triton.cdiv(block_size, strip), experts)](
        source,
        scale_inv,
        result,
        damaged,
        rows,
        cols,
        row_offset,
        col_offset,
        source.stride(),
        scale_inv.stride(),
        result.stride(),
        WIDE=_WIDE[wide],
        BLOCK=block_size,
        ROWS=strip,
        COLS=width,
        num_warps=WARPS,
    )


@triton.jit
def _strip(rows, cols, row_offset, col_offset, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The strip's row block and column block, its rows and columns, and which of its elements exist."""
    strips: tl.constexpr = (BLOCK + ROWS - 1) // ROWS
    row_block, col_block = tl.program_id(1) // strips, tl.program_id(0)
    in_row, in_col = tl.program_id(1) % strips * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    row, col = row_block * BLOCK + in_row - row_offset, col_block * BLOCK + in_col - col_offset
    here = ((in_row < BLOCK) & (row >= 0) & (row < rows))[:, None] & ((in_col < BLOCK) & (col >= 0) & (col < cols))
    return row_block, col_block, row[:, None], col[None, :], here


@triton.jit
def _at(pointer, strides, row, col):
    return pointer + tl.program_id(2).to(tl.int64) * strides[0] + row.to(tl.int64) * strides[1] + col * strides[2]


@triton.jit
def _report(damaged, scale, bad):
    """`damaged` becomes 1 if an element is bad or the scale not finite and positive; None means not asked."""
    if damaged is not None:
        usable = (scale > 0) & (scale < float("inf"))
        tl.store(damaged, 1, mask=(tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0) | (usable == 0))


@triton.jit
def dequantize(
    codes, scales, out, damaged, rows, cols, row_offset, col_offset, codes_at, scales_at, out_at,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = round(code * scale)."""
    row_block, col_block, row, col, here = _strip(rows, cols, row_offset, col_offset, BLOCK, ROWS, COLS)
    scale = tl.load(_at(scales, scales_at, row_block, col_block))
    code = tl.load(_at(codes, codes_at, row, col), mask=here, other=0.0)
    value = code.to(tl.float32).to(WIDE) * scale.to(WIDE)
    tl.store(_at(out, out_at, row, col), value.to(out.dtype.element_ty), mask=here)
    _report(damaged, scale, value != value)


@triton.jit
def quantize(
    values, scales, codes, damaged, rows, cols, row_offset, col_offset, values_at, scales_at, codes_at,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """code = round(clamp(value / scale)), with the division of IEEE 754."""
    row_block, col_block, row, col, here = _strip(rows, cols, row_offset, col_offset, BLOCK, ROWS, COLS)
    scale = tl.load(_at(scales, scales_at, row_block, col_block))
    value = tl.load(_at(values, values_at, row, col), mask=here, other=0.0).to(WIDE)
    if value.dtype == tl.float64:
        scaled = (value / scale.to(WIDE)).to(tl.float32)
    else:
        scaled = tl.div_rn(value, tl.broadcast_to(scale, value.shape))
    code = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(codes.dtype.element_ty)
    tl.store(_at(codes, codes_at, row, col), code, mask=here)
    _report(damaged, scale, (tl.abs(value) < float("inf")) == 0)
