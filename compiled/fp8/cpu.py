"""Block scales on the CPU, by `torch.compile`: what the bits of the codes say, written so that compilers vectorise it.

A scale is spread over the columns of its block, which costs 1/32 of a byte an element, and its row is chosen for each
row of the weight: the inner loop is then one run over the columns, whatever the blocks and offsets.

**Decoding.** Sign, exponent and mantissa of a code, shifted into a float32, stand for its value * 2^-120, the subnormal
codes as subnormal float32. The scales bring 2^120 along, which is exact, so the product has the bits of value * scale.
(Scales of 256 and more would overflow then, and a thread that flushes subnormals, after `torch.set_flush_denormal`,
would lose the subnormal codes: like float64 they get plain PyTorch.) The product is rounded to bfloat16 by integers, to
nearest even. A NaN code becomes some number; each row's greatest code tells of one, in the same pass.

Where columns come in pairs, as in every weight here, two codes are read as an int16 and two bfloat16 written as an
int32: to widen bytes and to narrow results is what costs most otherwise (a quarter of a call for 1536 x 3072).

**Encoding.** A normal quotient is rounded where its mantissa is cut, to nearest even; for the subnormal ones, adding
2^14 leaves units of 2^-9, the spacing of subnormal codes, in the last place of the sum. Beyond 448 it saturates.
Codes are made as int16 and narrowed by a copy: C++ lets a store of bytes change any other variable, the row of the
scales too, so a loop that stores bytes is not vectorised (16 ms a matrix of 1536 x 3072 on two cores, this way 4).

**Vectors.** Inductor writes these as scalar loops and the compiler vectorises them. Inductor forbids that to GCC
(`-fno-tree-loop-vectorize`) where it knows GCC by its name, hence `c++`. Its own vectors are slow here: without AVX-512
its float8 -> float32 is scalar, and its integer loads, as GCC 12 compiles them, go through memory and wait for it.

Compilations do not grow with the number of shapes: one for each dtype serves every matrix and stack (of bfloat16 two:
columns in pairs, or not), and strides other than contiguous ones, single rows and single columns cost one more each. So
does the next matrix where the first has as many columns, or pairs, as rows: its compilation takes them for one number.
"""

import functools
import shutil
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from reference.fp8 import FP8, FP8_MAX

_NAN = 0x7F  # the code, without its sign
_FP8_MAX_BITS = 0x43E00000  # 448 as float32
_ENCODED_AT_ONCE = 1 << 21  # elements
_SCALE_LIMIT = 2.0**8  # times 2^120 it is beyond float32
_LEAST_NORMAL = sys.float_info.min
_MAX_COMPILATIONS = 64  # of one function; beyond torch's own limit, 8, `fullgraph` is an error
_OPTIONS = {"cpp.simdlen": 1, "assert_indirect_indexing": False}
if shutil.which("c++"):
    _OPTIONS["cpp.cxx"] = (None, "c++")


def decode(weight: Tensor, scale_inv: Tensor, out: Tensor, block_size: int, row_offset: int, col_offset: int) -> bool:
    """out = round(weight * scale of its block), for [experts, rows, cols]; True if there is a NaN code.

    In place of NaN codes `out` is left undefined.
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
    """Source, result, every column's scale for each row of blocks, and the row of blocks of each of the source's rows.

    Of columns that are taken in pairs, every pair's scale. A stack is one tall matrix where its strides allow, so that
    it needs no compilation of its own.
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
        grid = grid.expand(2, -1)  # two rows at least, and contiguous in the end: one compilation less each
    spread = grid[..., None].expand(-1, -1, block_size // columns_a_scale).flatten(1)
    spread = spread.narrow(1, col_offset // columns_a_scale, cols // columns_a_scale).contiguous()
    row = _row_of_blocks(experts, rows, scale_inv.shape[1], block_size, row_offset)
    yield source.flatten(0, 1), result.flatten(0, 1), spread, row


@functools.lru_cache(32)
def _row_of_blocks(experts: int, rows: int, row_blocks: int, block_size: int, row_offset: int) -> Tensor:
    first = torch.arange(experts, device="cpu")[:, None] * row_blocks
    return ((torch.arange(rows, device="cpu") + row_offset) // block_size + first).flatten()


def _in_pairs(weight: Tensor, out: Tensor, block_size: int, col_offset: int) -> bool:
    """Whether two codes beside each other are one int16 in memory, their values one int32, and their scale the same."""
    bits = block_size | col_offset | weight.shape[2]
    for x in (weight, out):
        expert, row, col = x.stride()
        if col != 1:
            return False
        bits |= expert | row | x.storage_offset()
    return bits % 2 == 0


def _all_within(x: Tensor, bound: float) -> bool:
    if not x.numel():
        return True
    least, greatest = x.aminmax()  # NaN if one is
    return -bound < least.item() and greatest.item() < bound


def _flushes_subnormals() -> bool:
    return _LEAST_NORMAL * 0.5 == 0


def _compiled(function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """torch.compile at first call: `import torch._inductor` alone takes a second."""
    compiled = functools.cache(lambda: torch.compile(function, fullgraph=True, dynamic=True, options=_OPTIONS))

    @functools.wraps(function)
    def call(*operands: Tensor) -> Tensor | None:
        operands = [x.data for x in operands]  # not as views: what is compiled would depend on their bases' shapes
        with torch.no_grad():
            try:
                return compiled()(*operands)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILATIONS):
                    return compiled()(*operands)

    return call


def _small_value(codes: Tensor) -> Tensor:
    """int8 -> float32, the value * 2^-120."""
    return ((codes.to(torch.int32) << 20) & ~0x78000000).view(torch.float32)


def _round_to_bfloat16(values: Tensor) -> Tensor:
    """In the upper half of an int32, to nearest even."""
    bits = values.view(torch.int32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


def _greatest(codes: Tensor) -> Tensor:
    """Of each row, without sign."""
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
