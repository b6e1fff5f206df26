"""FP8 blocks on CPUs, by `torch.compile`: arithmetic on the bits of the codes, in loops that compilers can vectorise.

The scales of a row of blocks are repeated for each column, which takes 1/32 of a byte for each element, and each row of
the weight picks its row of them. So the inner loop runs over all columns, whatever the blocks and offsets.

**Decoding.** Sign, exponent and mantissa of a code, shifted into the bits of a float32, make its value * 2^-120;
subnormal codes make subnormal float32 numbers. The scales are multiplied by 2^120, which is exact, so the product has
the bits of value * scale. It is rounded to bfloat16, to nearest even, with integer arithmetic. A NaN code becomes some
number; the greatest code of each row, found in the same pass, tells whether there is one. Plain PyTorch is used instead
for float64, for scales of 256 and more, which would overflow, and after `torch.set_flush_denormal`, which would lose
the subnormal codes.

If the columns come in pairs, as in all of the model's weights, two codes are read as one int16 and two bfloat16 numbers
written as one int32. Widening single bytes and narrowing single results takes a quarter of a call for 1536 x 3072.

**Encoding.** A normal quotient is rounded to nearest even where its mantissa is cut. To a subnormal one 2^14 is added:
the last place of the sum is then 2^-9, the spacing of subnormal codes. Beyond 448 it saturates. Codes are made as int16
and narrowed by a copy, because a loop that stores bytes is not vectorised: in C++ such a store may change any variable,
so also the scales. That takes 16 ms for 1536 x 3072 on two cores; this way it takes 4.

**Vectors.** Inductor generates scalar loops here, and the compiler vectorises them. Inductor tells GCC not to
(`-fno-tree-loop-vectorize`) if it recognises GCC by name, so the compiler is called `c++`. Inductor's own vectors are
slow here: without AVX-512 its conversion from float8 to float32 is scalar, and its integer loads go through memory as
GCC 12 compiles them.

The number of compilations does not grow with the number of shapes. One for each dtype serves all matrices and stacks
(for bfloat16 two: columns in pairs or not). Strides that are not contiguous, single rows and single columns take one
more each. So does the second matrix if the first has as many columns, or pairs, as rows: its compilation then assumes
the two sizes to be equal.
"""

import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reference.fp8 import FP8, FP8_MAX

if TYPE_CHECKING:
    import torch._dynamo.exc  # at run time torch.compile imports it

_NAN = 0x7F  # the code, without its sign
_FP8_MAX_BITS = 0x43E00000  # 448 as float32
_ENCODED_AT_ONCE = 1 << 21  # elements
_SCALE_LIMIT = 2.0**8  # times 2^120 it is beyond float32
_LEAST_NORMAL = sys.float_info.min
_MAX_COMPILATIONS = 64  # of one function; torch's own limit is 8, and beyond it `fullgraph` raises
_OPTIONS = {"cpp.simdlen": 1, "assert_indirect_indexing": False}
if shutil.which("c++"):
    _OPTIONS["cpp.cxx"] = (None, "c++")


def decode(weight: Tensor, scale_inv: Tensor, out: Tensor, block_size: int, row_offset: int, col_offset: int) -> bool:
    """out = round(weight * scale of its block), for [experts, rows, cols]. True if there is a NaN code.

    Where the code is NaN, `out` is undefined.
    """
    plain = out.dtype == torch.float64 or _flushes_subnormals() or not _all_within(scale_inv, _SCALE_LIMIT)
    scales = scale_inv if plain else scale_inv * 2.0**120
    pairs = not plain and out.dtype == torch.bfloat16 and _in_pairs(weight, out, block_size, col_offset)
    damaged = False
    blocks = (block_size, row_offset, col_offset, 2 if pairs else 1)
    for codes, values, spread, row in _matrices(weight, out, scales, *blocks):
        bits = codes.view(torch.int8)
        if plain:
            wide = torch.promote_types(values.dtype, torch.float32)
            values.copy_(codes.to(wide) * spread[row])
            greatest = _greatest(bits)
        elif pairs:
            greatest = _decode_pairs_to_bfloat16(bits, bits.view(torch.int16), spread, row, values.view(torch.int32))
        elif values.dtype == torch.bfloat16:
            greatest = _decode_to_bfloat16(bits, spread, row, values.view(torch.int16))
        else:
            greatest = _decode(bits, spread, row, values)
        damaged = damaged or greatest.amax().item() == _NAN
    return damaged


def encode(weight: Tensor, scale_inv: Tensor, out: Tensor, block_size: int, row_offset: int, col_offset: int) -> None:
    """out = round(weight / scale of its block), for [experts, rows, cols]."""
    for values, codes, spread, row in _matrices(weight, out, scale_inv, block_size, row_offset, col_offset):
        if values.dtype == torch.float64 or _flushes_subnormals():
            wide = torch.promote_types(values.dtype, torch.float32)
            codes.copy_((values.to(wide) / spread[row]).clamp(-FP8_MAX, FP8_MAX).to(FP8))
        else:
            rows, cols = values.shape
            step = min(rows, max(1, _ENCODED_AT_ONCE // cols))
            wide = torch.empty(step, cols, dtype=torch.int16, device="cpu")
            for part, place, of_part in zip(values.split(step), codes.split(step), row.split(step), strict=True):
                _encode(part, spread, of_part, wide[: len(part)])
                place.view(torch.uint8).copy_(wide[: len(part)])


def _matrices(
    source: Tensor,
    result: Tensor,
    scale_inv: Tensor,
    block_size: int,
    row_offset: int,
    col_offset: int,
    columns_a_scale: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(source, result, scales, row of blocks): 2-D, the scales one for each column, the last the index of each row's.

    With `columns_a_scale` 2 there is one scale for each pair of columns. A stack is taken as one tall matrix if its
    strides allow that, so that it needs no compilation of its own.
    """
    experts, rows, cols = source.shape
    if not source.numel():
        return
    if experts > 1 and not all(x.stride(0) == rows * x.stride(1) for x in (source, result)):
        for one in zip(source.split(1), result.split(1), scale_inv.split(1), strict=True):
            yield from _matrices(*one, block_size, row_offset, col_offset, columns_a_scale)
        return
    grid = scale_inv.flatten(0, 1)
    if len(grid) == 1:
        grid = grid.expand(2, -1)  # a single row would need a compilation of its own
    spread = grid[..., None].expand(-1, -1, block_size // columns_a_scale).flatten(1)
    spread = spread.narrow(1, col_offset // columns_a_scale, cols // columns_a_scale).contiguous()
    row = _row_of_blocks(experts, rows, scale_inv.shape[1], block_size, row_offset)
    yield source.flatten(0, 1), result.flatten(0, 1), spread, row


@functools.lru_cache(32)
def _row_of_blocks(experts: int, rows: int, row_blocks: int, block_size: int, row_offset: int) -> Tensor:
    first = torch.arange(experts, device="cpu")[:, None] * row_blocks
    return ((torch.arange(rows, device="cpu") + row_offset) // block_size + first).flatten()


def _in_pairs(weight: Tensor, out: Tensor, block_size: int, col_offset: int) -> bool:
    """Whether neighbouring codes can be read as int16, their values written as int32, and each pair has one scale."""
    bits = block_size | col_offset | weight.shape[2]
    for x in (weight, out):
        expert, row, col = x.stride()
        if col != 1:
            return False
        bits |= expert | row | x.storage_offset()
    return not bits % 2


def _all_within(x: Tensor, bound: float) -> bool:
    if not x.numel():
        return True
    least, greatest = x.aminmax()  # NaN if one is
    return -bound < least.item() and greatest.item() < bound


def _flushes_subnormals() -> bool:
    return _LEAST_NORMAL * 0.5 == 0


def _compiled[Result: Tensor | None](function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, compiled at its first call: importing torch._inductor alone takes a second."""
    compiled = functools.cache(lambda: torch.compile(function, fullgraph=True, dynamic=True, options=_OPTIONS))

    @functools.wraps(function)
    def call(*operands: Tensor) -> Result:
        tensors = [x.data for x in operands]  # no views: compilations would depend on the shapes of their bases
        with torch.no_grad():
            try:
                return compiled()(*tensors)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILATIONS):
                    return compiled()(*tensors)

    return call


def _small_value(codes: Tensor) -> Tensor:
    """The value of each code (int8) * 2^-120, as float32."""
    return ((codes.to(torch.int32) << 20) & ~0x78000000).view(torch.float32)


def _round_to_bfloat16(values: Tensor) -> Tensor:
    """Rounded to nearest even; the bfloat16 is the upper half of the int32."""
    bits = values.view(torch.int32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


def _greatest(codes: Tensor) -> Tensor:
    """The greatest code of each row, signs ignored."""
    return (codes & 0x7F).amax(1)


@_compiled
def _decode_to_bfloat16(codes: Tensor, large: Tensor, row: Tensor, out: Tensor) -> Tensor:
    """`large`: the scales * 2^120."""
    out.copy_(_round_to_bfloat16(_small_value(codes) * large[row]) >> 16)
    return _greatest(codes)


@_compiled
def _decode_pairs_to_bfloat16(codes: Tensor, pairs: Tensor, large: Tensor, row: Tensor, out: Tensor) -> Tensor:
    """`pairs`: the codes as int16; `out`: the values as int32; `large`: the scales * 2^120, one for each pair."""
    wide, scale = pairs.to(torch.int32), large[row]
    low = _round_to_bfloat16((((wide << 24) >> 4) & ~0x78000000).view(torch.float32) * scale)
    high = _round_to_bfloat16(((wide << 12) & ~0x780FFFFF).view(torch.float32) * scale)
    out.copy_(((low >> 16) & 0xFFFF) | (high & ~0xFFFF))
    return _greatest(codes)


@_compiled
def _decode(codes: Tensor, large: Tensor, row: Tensor, out: Tensor) -> Tensor:
    out.copy_(_small_value(codes) * large[row])
    return _greatest(codes)


@_compiled
def _encode(weight: Tensor, spread: Tensor, row: Tensor, codes: Tensor) -> None:
    quotient = (weight.to(torch.float32) / spread[row]).view(torch.int32)
    magnitude = (quotient & 0x7FFFFFFF).clamp(max=_FP8_MAX_BITS)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (magnitude.view(torch.float32) + 2.0**14).view(torch.int32) - (141 << 23)
    below = (magnitude - (121 << 23)) >> 31  # all ones below 2^-6, else 0
    codes.copy_((subnormal & below) | (normal & ~below) | ((quotient >> 24) & 0x80))
