"""Triton kernels for FP8 blocks. Each program handles a strip of rows of one block, so it needs a single scale.

The grid is (column blocks, strips of all row blocks, experts), counted on the grid of the scales. For a slice that
starts inside a block, `row_offset` rows and `col_offset` columns after its start, the elements before it are masked.
Tensors are [experts, rows, cols] with any strides; `*_at` are the strides.

**Speed.** On one H200, 256 experts of 1536 x 3072, as a share of the bandwidth of a copy of as many bytes
(tests/benchmarks/results/fp8_h200.json):

    decoding                                       95 %
    encoding, with given or fresh scales          103 %
    torch.compile of the formula, sizes constant   95 % decoding, one compilation for each shape
    torch.compile of the formula, sizes free        6 % decoding

A thread has 32 elements: with 8, starting the programs takes longer than moving their bytes.

**Division.** float32 division, a dozen instructions and a branch for each element, takes longer than moving the bytes.
The kernels multiply by 1 / scale in float64 and round to float32, which gives the same bits: a quotient of float32
numbers differs from every midpoint between neighbouring float32 numbers by at least 2^-49 of itself, and the product,
rounded twice in float64, is off by at most 2^-52. (Where the quotient is a subnormal float32, whose rounding is
coarser, the code is 0 either way.)

Triton compiles once, and once more for each pattern of sizes, strides and offsets that are 1 or multiples of 16. float8
needs compute capability 8.9.
"""

# ruff: noqa: N803  (upper case: compile-time constants)

import torch
import triton
import triton.language as tl
from torch import Tensor

from compiled.triton_launch import Launcher

STRIP, WARPS = 32, 4  # of a program: rows and warps
WHOLE_BLOCK_WARPS = 8  # of a program that handles a whole block
_ELEMENT = {
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64,
}  # fmt: skip
# Bytes. Addresses that are passed in a tensor, which Triton does not look at, must be multiples of it.
_ALIGNMENT = tl.constexpr(16)


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
    *,
    powers_of_two: bool = False,
) -> None:
    """Launch `kernel` from source to result, both [experts, rows, cols]; it computes in the dtype `wide`.

    `result` may be a list of [rows, cols], one for each expert, if `kernel` is `dequantize`. That is one launch if all
    have the same strides and aligned addresses, else one for each expert. With `powers_of_two`, the scales that
    `quantize_afresh` makes are rounded up to them.
    """
    each = None
    if not isinstance(result, Tensor):
        if len({one.stride() for one in result}) > 1 or any(one.data_ptr() % _ALIGNMENT.value for one in result):
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
    constants = {dequantize: (each,), quantize_afresh: (powers_of_two,)}.get(kernel, ())
    kernel(
        (col_blocks, row_blocks * triton.cdiv(block_size, strip), experts),
        (
            source, scale_inv, target, damaged, rows, cols, row_offset, col_offset,
            source.stride(), scale_inv.stride(), target_at,
        ),
        (_ELEMENT[wide], block_size, strip, width, *constants),
        warps=warps,
    )  # fmt: skip


@triton.jit
def _strip(rows, cols, row_offset, col_offset, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The strip's row block and column block, its rows, its columns, and the mask of elements inside the tensor."""
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
    """Set `damaged`, unless it is None, to 1 if an element is not finite or the scale is not finite and positive."""
    if damaged is not None:
        good = (amax < float("inf")) & (scale > 0) & (scale < float("inf"))
        tl.store(damaged, 1, mask=good == 0)


@Launcher
@triton.jit
def dequantize(
    codes, scales, out, damaged, rows, cols, row_offset, col_offset, codes_at, scales_at, out_at,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """out = round(code * scale). With EACH, a dtype, `out` holds the address of each expert's result."""
    row_block, col_block, row, col, here = _strip(rows, cols, row_offset, col_offset, BLOCK, ROWS, COLS)
    scale = tl.load(_at(scales, scales_at, row_block, col_block))
    code = tl.load(_at(codes, codes_at, row, col), mask=here, other=0.0).to(tl.float32)
    value = code.to(WIDE) * scale.to(WIDE)
    if EACH is not None:
        out = tl.multiple_of(tl.load(out + tl.program_id(2)).to(tl.pointer_type(EACH)), _ALIGNMENT)
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
    WIDE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, POWERS_OF_TWO: tl.constexpr,
):  # fmt: skip
    """The same with scale = amax / 448, which is stored. The strip is a whole block, which is read once.

    With POWERS_OF_TWO the scale is rounded up to one, and is at least 2^-126. The quotient rounds to no more than a
    power of two unless amax is more than 448 times that, so rounding it up is exact.
    """
    row_block, col_block, row, col, here = _strip(rows, cols, row_offset, col_offset, BLOCK, ROWS, COLS)
    value = tl.load(_at(values, values_at, row, col), mask=here, other=0.0).to(WIDE)
    amax = _amax(value)
    scale = tl.div_rn(amax.to(tl.float32), 448.0)
    if POWERS_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.where(amax.to(tl.float32) > 0, tl.maximum(bits, 1 << 23), 0).to(tl.float32, bitcast=True)
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(_at(scales, scales_at, row_block, col_block), scale)
    code = _encode(value, scale)
    tl.store(_at(codes, codes_at, row, col), code.to(codes.dtype.element_ty), mask=here)
    _report(damaged, scale, amax)


@triton.jit
def _encode(value, scale):
    scale = scale.to(tl.float64)
    # 1 / scale is written first: after the conversion of the value it takes 40 registers more.
    quotient = value / scale if value.dtype == tl.float64 else (1.0 / scale) * value.to(tl.float64)
    return tl.clamp(quotient.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
