"""FP8 block storage: a float8_e4m3fn matrix and one float32 scale for each square block of it.

    value = float8 * scale_inv          (`scale_inv` multiplies, despite its name)

The product is formed in float32 and rounded once. Blocks at the right and lower edge may be smaller. Fresh scales are
amax(block) / 448, and 1 for an all-zero block; under `scale_fmt` "ue8m0" they are rounded up to powers of two.

Scales are written as float32. Files also have them in narrower dtypes that float32 holds exactly (`SCALE_DTYPES`). Some
tools write a scale of 0 over a block whose codes are all zeros: its values are 0. Over any other code a scale of 0 is
damage.

Re-encoding round_bf16(float8 * s) on the *same* s gives the same bytes, because bfloat16 keeps 8 significant bits and
e4m3 keeps 4: so a checkpoint that goes through bfloat16 can come back byte-identical if its scales are kept. On a
freshly computed scale it does not in general. `requantize_blockwise` uses that: it keeps each source scale whose block
is untouched, and makes a fresh scale for each block that has changed. A weight that is float32 by now may have been
bfloat16 on its way, so it is untouched too if it is the source's value rounded to bfloat16 (`possible_roundings`).

Source: the released checkpoints' `quantization_config`; `transformers` integrations/finegrained_fp8.
"""

import torch
from jaxtyping import Bool, Float, Float8e4m3fn, Float32, Shaped
from torch import Tensor

from reference.config import FP8_BLOCK, ScaleFormat

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
LEAST_POWER_OF_TWO = 2.0**-126  # of "ue8m0" scales: the least that is a normal float32
_NAN_MAGNITUDE = 0x7F  # S.1111.111 is e4m3fn's only NaN; it has no infinities


def scale_grid(shape: tuple[int, ...], block_size: int = FP8_BLOCK) -> tuple[int, ...]:
    """The shape of `scale_inv` for a weight of `shape`: ceil(rows / block) x ceil(cols / block) for each matrix."""
    *stack, rows, cols = shape
    return (*stack, -(-rows // block_size), -(-cols // block_size))


def check_scale_grid(
    weight_shape: tuple[int, ...], scale_shape: tuple[int, ...], *, block_size: int = FP8_BLOCK, name: str = "weight"
) -> None:
    """Check that the grid of scales covers the weight exactly.

    Raises:
        ValueError: it does not; names the tensor, the grid found and the grid expected.
    """
    if len(weight_shape) < 2:
        raise ValueError(f"{name}: block scales need a matrix, found shape {list(weight_shape)}")
    expected = scale_grid(weight_shape, block_size)
    if tuple(scale_shape) != expected:
        raise ValueError(
            f"{name}_scale_inv: found a grid of {list(scale_shape)} scales, expected {list(expected)} for a weight of "
            f"{list(weight_shape)} in blocks of {block_size}x{block_size}; weight and scales do not belong together, "
            "or weight_block_size in config.json is wrong"
        )


def float32_scales(scale_inv: Shaped[Tensor, "*grid"], *, name: str = "weight") -> Float32[Tensor, "*grid"]:
    """Block scales as float32, which holds each of `SCALE_DTYPES` exactly; the same tensor if they are float32.

    Raises:
        ValueError: they are of another dtype; names the tensor.
    """
    if scale_inv.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{name}_scale_inv: found {scale_inv.dtype}, expected one of {', '.join(map(str, SCALE_DTYPES))}; store "
            "the scales as float32"
        )
    return scale_inv.to(torch.float32)


def zero_blocks(
    weight: Shaped[Tensor, "*stack rows cols"],
    *,
    block_size: int = FP8_BLOCK,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Bool[Tensor, "*stack row_blocks col_blocks"]:
    """Which blocks of a weight, or of its float8 codes, hold nothing but zeros, of either sign.

    A slice of a weight starts `row_offset` rows and `col_offset` columns inside the first block.
    """
    nonzero = weight.view(torch.uint8) & _NAN_MAGNITUDE != 0 if weight.dtype == FP8 else weight != 0
    return ~_any_in_block(torch.nn.functional.pad(nonzero, (col_offset, 0, row_offset, 0)), block_size)


def check_scale_values(
    scale_inv: Float32[Tensor, "*grid"], all_zero: Bool[Tensor, "*grid"], *, name: str = "weight"
) -> None:
    """Check that every scale is finite and positive, or 0 over a block that is `all_zero`.

    Raises:
        ValueError: one is not; names the tensor, the first bad block and its value.
    """
    bad = ~(torch.isfinite(scale_inv) & ((scale_inv > 0) | (_is_zero(scale_inv) & all_zero)))
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}_scale_inv: scale of block {where} is {scale_inv[tuple(where)].item()}, expected a finite positive "
            f"number ({int(bad.sum())} bad of {bad.numel()}), or 0 over a block of zeros; the checkpoint is damaged, "
            "fetch the file again"
        )


def are_powers_of_two(scale_inv: Float32[Tensor, "*grid"]) -> bool:
    """Whether every scale is what `scale_fmt` "ue8m0" says: a power of two, or the 0 of a block of zeros."""
    return bool(((torch.frexp(scale_inv).mantissa == 0.5) | _is_zero(scale_inv)).all())


def divisors(scale_inv: Float32[Tensor, "*grid"]) -> Float32[Tensor, "*grid"]:
    """The scales to encode on: 1 in place of 0, which a block of zeros may have, and any scale encodes zeros."""
    return scale_inv.masked_fill(_is_zero(scale_inv), 1.0)


def check_codes(weight: Float8e4m3fn[Tensor, "*shape"], *, name: str = "weight") -> None:
    """Check that no value is NaN.

    Raises:
        ValueError: one is; names the tensor and the first position.
    """
    bad = (weight.view(torch.uint8) & _NAN_MAGNITUDE) == _NAN_MAGNITUDE
    if bad.any():
        raise ValueError(
            f"{name}: float8 code at {bad.nonzero()[0].tolist()} is NaN ({int(bad.sum())} of {bad.numel()}), expected "
            "finite values; the checkpoint is damaged, fetch the file again"
        )


def dequantize_blockwise(
    weight: Float8e4m3fn[Tensor, "*stack rows cols"],
    scale_inv: Float32[Tensor, "*stack -(-rows//{block_size}) -(-cols//{block_size})"],
    *,
    block_size: int = FP8_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
) -> Float[Tensor, "*stack rows cols"]:
    """value = float8 * scale_inv of its block, formed in float32 (float64 for a float64 result), rounded once.

    `name` is what errors call the tensor.

    Raises:
        ValueError: the grid does not cover the weight, a scale is not finite and positive (nor 0 over zeros), or a code
            is NaN.
    """
    check_scale_grid(weight.shape, scale_inv.shape, block_size=block_size, name=name)
    check_scale_values(scale_inv, zero_blocks(weight, block_size=block_size), name=name)
    check_codes(weight, name=name)
    return _decode(weight, scale_inv, block_size, dtype)


def quantize_blockwise(
    weight: Float[Tensor, "*stack rows cols"],
    *,
    block_size: int = FP8_BLOCK,
    scale_inv: Float32[Tensor, "*stack -(-rows//{block_size}) -(-cols//{block_size})"] | None = None,
    scale_fmt: ScaleFormat = "float",
    name: str = "weight",
) -> tuple[Float8e4m3fn[Tensor, "*stack rows cols"], Float32[Tensor, "*stack row_blocks col_blocks"]]:
    """float8 = round(weight / scale_inv), on fresh scales where none are given: s = amax(block) / 448, 1 if that is 0.

    With `scale_fmt` "ue8m0" a fresh scale is 2^ceil(log2(amax(block) / 448)), at least `LEAST_POWER_OF_TWO`. With
    `scale_inv` the weight is encoded on those scales; a value of more than 448 times its scale becomes +-448.

    Raises:
        ValueError: the weight holds a value that is not finite, or the given scales are unusable (as in
            `dequantize_blockwise`).
    """
    if not torch.isfinite(weight).all():
        where = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise ValueError(f"{name}: value at {where} is {weight[tuple(where)].item()}, expected finite values")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if scale_inv is None:
        scale_inv = fresh_scales(_amax(wide, block_size), scale_fmt)
    check_scale_grid(weight.shape, scale_inv.shape, block_size=block_size, name=name)
    check_scale_values(scale_inv, zero_blocks(weight, block_size=block_size), name=name)
    scaled = wide / _spread(divisors(scale_inv), weight.shape, block_size)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8), scale_inv


def fresh_scales(amax: Float32[Tensor, "*grid"], scale_fmt: ScaleFormat) -> Float32[Tensor, "*grid"]:
    """The scales of blocks whose greatest magnitudes are `amax` (see `quantize_blockwise`)."""
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, 0.5 <= mantissa < 1; 448 = 0.875 * 2^9
        power = exponent - 9 + (mantissa > FP8_MAX / 2**9)
        scale = ((power.clamp(min=-126) + 127) << 23).view(torch.float32)  # 2^power
        return torch.where(amax > 0, scale, torch.ones_like(scale))
    scale = amax / FP8_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def requantize_blockwise(
    weight: Float[Tensor, "*stack rows cols"],
    scale_inv: Float32[Tensor, "*stack -(-rows//{block_size}) -(-cols//{block_size})"],
    *,
    block_size: int = FP8_BLOCK,
    scale_fmt: ScaleFormat = "float",
    name: str = "weight",
) -> tuple[Float8e4m3fn[Tensor, "*stack rows cols"], Float32[Tensor, "*stack row_blocks col_blocks"]]:
    """Encode on the source's scales where that loses nothing, on fresh scales where the block has changed.

    A block is untouched when decoding its re-encoding, in one of `possible_roundings(weight.dtype)`, gives back exactly
    `weight`; its bytes and its scale are then the source's. Every other block gets a fresh scale. Zeros keep their
    sign, which is their code's, and the source's scale, which may be 0.

    Raises:
        ValueError: as in `quantize_blockwise`; but a scale of 0 may be over any values, and they get a fresh one.
    """
    kept, _ = quantize_blockwise(weight, block_size=block_size, scale_inv=divisors(scale_inv), name=name)
    changed = torch.ones_like(scale_inv, dtype=torch.bool)
    for dtype in possible_roundings(weight.dtype):
        decoded = _decode(kept, scale_inv, block_size, dtype).to(weight.dtype)
        changed &= _any_in_block(decoded != weight, block_size)
    if not changed.any():
        return kept, scale_inv
    fresh, new_scales = quantize_blockwise(weight, block_size=block_size, scale_fmt=scale_fmt, name=name)
    mixed = torch.where(changed, new_scales, scale_inv)
    inside = _spread(changed, weight.shape, block_size)
    return torch.where(inside, fresh.view(torch.uint8), kept.view(torch.uint8)).view(FP8), mixed


def possible_roundings(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """To what an untouched weight that is `dtype` now may have been decoded: this dtype, or bfloat16 or float32 before.

    A weight was widened to get here, if anything: narrower dtypes count if `dtype` holds all their values.
    """
    return dtype, *(
        narrower
        for narrower in (torch.bfloat16, torch.float32)
        if narrower != dtype and torch.promote_types(narrower, dtype) == dtype
    )


def _decode(weight: Tensor, scale_inv: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.to(wide) * _spread(scale_inv, weight.shape, block_size)).to(dtype)


def _is_zero(scale_inv: Tensor) -> Tensor:
    """-0.0 is none: nobody writes it."""
    return (scale_inv == 0) & ~scale_inv.signbit()


def _spread(grid: Tensor, shape: torch.Size, block_size: int) -> Tensor:
    """Each block's value at each of its elements."""
    rows, cols = shape[-2:]
    tall = grid.repeat_interleave(block_size, dim=-2)[..., :rows, :]
    return tall.repeat_interleave(block_size, dim=-1)[..., :cols]


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """[..., row_blocks, block, col_blocks, block], edge blocks filled up with zeros."""
    *stack, rows, cols = x.shape
    row_blocks, col_blocks = scale_grid((rows, cols), block_size)
    padded = torch.nn.functional.pad(x, (0, col_blocks * block_size - cols, 0, row_blocks * block_size - rows))
    return padded.view(*stack, row_blocks, block_size, col_blocks, block_size)


def _amax(x: Tensor, block_size: int) -> Tensor:
    return _blocks(x.abs(), block_size).amax((-3, -1)).to(torch.float32)


def _any_in_block(x: Bool[Tensor, "..."], block_size: int) -> Bool[Tensor, "..."]:
    return _blocks(x, block_size).any(-1).any(-2)
