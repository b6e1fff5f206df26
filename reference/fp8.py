"""FP8 block storage: a float8_e4m3fn matrix and one float32 scale for each square block of it.

    value = float8 * scale_inv          (`scale_inv` multiplies, despite its name)

The product is formed in float32 and rounded once. Blocks at the right and lower edge may be smaller. Fresh scales are
amax(block) / 448, and 1 for an all-zero block; they are not rounded to powers of two.

Re-encoding round_bf16(float8 * s) on the *same* s gives the same bytes, because bfloat16 keeps 8 significant bits and
e4m3 keeps 4: so a checkpoint that goes through bfloat16 can come back byte-identical if its scales are kept. On a
freshly computed scale it does not in general. `requantize_blockwise` uses that: it keeps each source scale whose block
is untouched, and makes a fresh scale for each block that has changed.

Source: the released checkpoints' `quantization_config`; `transformers` integrations/finegrained_fp8.
"""

import torch
from jaxtyping import Bool, Float, Float8e4m3fn, Float32
from torch import Tensor

from reference.config import FP8_BLOCK

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
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


def check_scale_values(scale_inv: Float32[Tensor, "*grid"], *, name: str = "weight") -> None:
    """Check that every scale is finite and positive.

    Raises:
        ValueError: one is not; names the tensor, the first bad block and its value.
    """
    bad = ~(torch.isfinite(scale_inv) & (scale_inv > 0))
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}_scale_inv: scale of block {where} is {scale_inv[tuple(where)].item()}, expected a finite positive "
            f"number ({int(bad.sum())} bad of {bad.numel()}); the checkpoint is damaged, fetch the file again"
        )


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
        ValueError: the grid does not cover the weight, a scale is not finite and positive, or a code is NaN.
    """
    check_scale_grid(weight.shape, scale_inv.shape, block_size=block_size, name=name)
    check_scale_values(scale_inv, name=name)
    check_codes(weight, name=name)
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.to(wide) * _spread(scale_inv, weight.shape, block_size)).to(dtype)


def quantize_blockwise(
    weight: Float[Tensor, "*stack rows cols"],
    *,
    block_size: int = FP8_BLOCK,
    scale_inv: Float32[Tensor, "*stack -(-rows//{block_size}) -(-cols//{block_size})"] | None = None,
    name: str = "weight",
) -> tuple[Float8e4m3fn[Tensor, "*stack rows cols"], Float32[Tensor, "*stack row_blocks col_blocks"]]:
    """float8 = round(weight / scale_inv), with scale_inv = amax(block) / 448 where none is given.

    With `scale_inv` the weight is encoded on those scales; a value of more than 448 times its scale becomes +-448.

    Raises:
        ValueError: the weight holds a value that is not finite, or the given scales are unusable (as in
            `dequantize_blockwise`).
    """
    if not torch.isfinite(weight).all():
        where = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise ValueError(f"{name}: value at {where} is {weight[tuple(where)].item()}, expected finite values")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if scale_inv is None:
        scale_inv = _fresh_scales(wide, block_size)
    check_scale_grid(weight.shape, scale_inv.shape, block_size=block_size, name=name)
    check_scale_values(scale_inv, name=name)
    scaled = wide / _spread(scale_inv, weight.shape, block_size)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8), scale_inv


def requantize_blockwise(
    weight: Float[Tensor, "*stack rows cols"],
    scale_inv: Float32[Tensor, "*stack -(-rows//{block_size}) -(-cols//{block_size})"],
    *,
    block_size: int = FP8_BLOCK,
    name: str = "weight",
) -> tuple[Float8e4m3fn[Tensor, "*stack rows cols"], Float32[Tensor, "*stack row_blocks col_blocks"]]:
    """Encode on the source's scales where that loses nothing, on fresh scales where the block has changed.

    A block is untouched when decoding its re-encoding gives back exactly `weight`; its bytes and its scale are then the
    source's. Every other block gets scale_inv = amax / 448.

    Raises:
        ValueError: as in `quantize_blockwise`.
    """
    kept, _ = quantize_blockwise(weight, block_size=block_size, scale_inv=scale_inv, name=name)
    decoded = dequantize_blockwise(kept, scale_inv, block_size=block_size, dtype=weight.dtype, name=name)
    changed = _any_in_block(decoded != weight, block_size)
    if not changed.any():
        return kept, scale_inv
    fresh, fresh_scales = quantize_blockwise(weight, block_size=block_size, name=name)
    mixed = torch.where(changed, fresh_scales, scale_inv)
    inside = _spread(changed, weight.shape, block_size)
    return torch.where(inside, fresh.view(torch.uint8), kept.view(torch.uint8)).view(FP8), mixed


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


def _fresh_scales(x: Tensor, block_size: int) -> Tensor:
    amax = _blocks(x.abs(), block_size).amax((-3, -1)).to(torch.float32)
    scale = amax / FP8_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _any_in_block(x: Bool[Tensor, "..."], block_size: int) -> Bool[Tensor, "..."]:
    return _blocks(x, block_size).any(-1).any(-2)
