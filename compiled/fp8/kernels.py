"""Triton kernels of the block scales: a program is a strip of one block, so that its scale is one number.

The grid is (column blocks, strips of row blocks, experts), counted on the grid of the scales: a slice that starts
inside a block (`row_offset`, `col_offset` elements after its start) only masks off what lies before it. Tensors are
[experts, rows, cols] of any strides, `*_at`.

**Speed.** On one H200 (torch 2.11), 256 experts of 1536 x 3072, against a copy of as many bytes: decoding 95 %,
encoding 102 %, with fresh scales too (tests/benchmarks/results/fp8_h200.json). Inductor decodes as fast only with every
size a constant, at one compilation a shape; with free sizes it comes to 6 %. A thread has 32 elements: with 8, starting
programs takes longer than their bytes.

**Division** took longer than the bytes too: a dozen instructions an element and a branch. A quotient of float32s is at
least 2^-49 of itself away from where float32 rounding turns over, and never on it; the value times 1 / scale, both
roundings in float64, is off by at most 2^-52. So rounding that product to float32 gives the division's bits. (Where the
quotient is a subnormal float32, whose rounding is coarser, the code is 0 either way.)

Triton compiles once, and again for each pattern of sizes, strides and offsets that are multiples of 16 or 1. float8
needs compute capability 8.9.
"""

# ruff: noqa: N803  (upper case: compile-time constants)

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiled.triton_launch import Launcher

STRIP, WARPS = 32, 4  # rows of a program, and its warps
WHOLE_BLOCK_WARPS = 8  # where a program is a whole block
_ELEMENT = {
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64,
}  # fmt: skip
_ALIGNMENT = 16  # bytes, of tensors of which only the address is passed


def launch(
    kernel: Launcher,
    source: Tensor,
    scale_inv: Tensor,
    result: Tensor | list[Tensor],
    damaged: Tensor | None,
    block_size: int,
    row_offset: int,
    col_offset: int,
    wide: torch.dtype,
) -> None:
    """`kernel` from source to result, both [experts, rows, cols]; products and quotients are formed in `wide`.

    `dequantize` may be given a result [rows, cols] for each expert: one launch if they lie alike, else one for each.
    """
    each = None
    if not isinstance(result, Tensor):
        if len({one.stride() for one in result}) > 1 or any(one.data_ptr() % _ALIGNMENT for one in result):
            for codes, scales, one in zip(source, scale_inv, result, strict=True):
                launch(kernel, codes[None], scales[None], one[None], damaged, block_size, row_offset, col_offset, wide)
            return
        each, target_at = _ELEMENT[result[0].dtype], (0, *result[0].stride())
        target = torch.tensor([one.data_ptr() for one in result]).to(source.device, non_blocking=True)
    else:
        target, target_at = result, result.stride()
    experts, rows, cols = source.shape
    _, row_blocks, col_blocks = scale_inv.shape
    width = triton.next_power_of_2(block_size)
    strip, warps = (width, WHOLE_BLOCK_WARPS) if kernel is quantize_afresh else (min(STRIP, width), WARPS)
    kernel(
        (col_blocks, row_blocks * triton.cdiv(block_size, strip), experts),
        (
            source, scale_inv, target, damaged, rows, cols, row_offset, col_offset,
            source.stride(), scale_inv.stride(), target_at,
        ),
        (_ELEMENT[wide], block_size, strip, width, *([each] if kernel is dequantize else [])),
        warps=warps,
    )  # fmt: skip


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
def _greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _amax(x):
    """The greatest magnitude; NaN if x holds one."""
    return tl.reduce(tl.reduce(tl.abs(x), 1, _greater), 0, _greater)


@triton.jit
def _report(damaged, scale, amax):
    """`damaged` becomes 1 unless the elements are finite and the scale finite and positive; None means not asked."""
    if damaged is not None:
        good = (amax < float("inf")) & (scale > 0) & (scale < float("inf"))
        tl.store(damaged, 1, mask=good == 0)


@Launcher
@triton.jit
def dequantize(
    codes, scales, out, damaged, rows, cols, row_offset, col_offset, codes_at, scales_at, out_at,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """out = round(code * scale); with EACH, `out` holds the address of each expert's, of elements EACH."""
    row_block, col_block, row, col, here = _strip(rows, cols, row_offset, col_offset, BLOCK, ROWS, COLS)
    scale = tl.load(_at(scales, scales_at, row_block, col_block))
    code = tl.load(_at(codes, codes_at, row, col), mask=here, other=0.0).to(tl.float32)
    value = code.to(WIDE) * scale.to(WIDE)
    if EACH is not None:
        out = tl.multiple_of(tl.load(out + tl.program_id(2)).to(tl.pointer_type(EACH)), 16)
    tl.store(_at(out, out_at, row, col), value.to(out.dtype.element_ty), mask=here)
    _report(damaged, scale, _amax(code))


@Launcher
@triton.jit
def quantize(
    values, scales, codes, damaged, rows, cols, row_offset, col_offset, values_at, scales_at, codes_at,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """code = round(clamp(value / scale))."""
    row_block, col_block, row, col, here = _strip(rows, cols, row_offset, col_offset, BLOCK, ROWS, COLS)
    value = tl.load(_at(values, values_at, row, col), mask=here, other=0.0).to(WIDE)
    amax = _amax(value)
    scale = tl.load(_at(scales, scales_at, row_block, col_block))
    code = _encode(value, scale)
    tl.store(_at(codes, codes_at, row, col), code.to(codes.dtype.element_ty), mask=here)
    _report(damaged, scale, amax)


@Launcher
@triton.jit
def quantize_afresh(
    values, scales, codes, damaged, rows, cols, row_offset, col_offset, values_at, scales_at, codes_at,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The same on scale = amax / 448, which is stored; the strip is the whole block, and is read once."""
    row_block, col_block, row, col, here = _strip(rows, cols, row_offset, col_offset, BLOCK, ROWS, COLS)
    value = tl.load(_at(values, values_at, row, col), mask=here, other=0.0).to(WIDE)
    amax = _amax(value)
    scale = tl.div_rn(amax.to(tl.float32), 448.0)
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(_at(scales, scales_at, row_block, col_block), scale)
    code = _encode(value, scale)
    tl.store(_at(codes, codes_at, row, col), code.to(codes.dtype.element_ty), mask=here)
    _report(damaged, scale, amax)


@triton.jit
def _encode(value, scale):
    scale = scale.to(tl.float64)
    # 1 / scale first: written after the conversion, it costs 40 registers more
    quotient = value / scale if value.dtype == tl.float64 else (1.0 / scale) * value.to(tl.float64)
    return tl.clamp(quotient.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
