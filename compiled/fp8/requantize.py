"""Back to FP8 with the source's scales where they still fit: `reference.fp8.requantize_blockwise`, fast.

A block keeps its scale if encoding with it and decoding again gives exactly the weight; every other block gets a fresh
scale. Usually all blocks of a weight are unchanged, or all have changed. The first case takes one encoding and one
decoding (two where a float32 weight has gone through bfloat16), the second one encoding more.
"""

import torch
from jaxtyping import Float, Float8e4m3fn, Float32
from torch import Tensor

from compiled.fp8.blockwise import dequantize_blockwise, quantize_blockwise
from compiled.fp8.operators import traceable_requantize
from reference.config import FP8_BLOCK, ScaleFormat
from reference.fp8 import divisors, possible_roundings, scale_grid


@traceable_requantize
def requantize_blockwise(
    weight: Float[Tensor, "*experts rows cols"],
    scale_inv: Float32[Tensor, "*experts row_blocks col_blocks"],
    *,
    block_size: int = FP8_BLOCK,
    scale_fmt: ScaleFormat = "float",
    name: str = "weight",
) -> tuple[Float8e4m3fn[Tensor, "*experts rows cols"], Float32[Tensor, "*experts row_blocks col_blocks"]]:
    """Encode with the source's scale where that is exact, with a fresh scale where the block has changed.

    A float32 block is untouched if it is the source's in float32, or rounded to bfloat16 on its way. A source's scale
    of 0 stays over a block of zeros, and any other block gets a fresh one.

    Raises:
        ValueError: as `compiled.fp8.quantize_blockwise`.
    """
    kept, _ = quantize_blockwise(weight, block_size=block_size, scale_inv=divisors(scale_inv), name=name)
    changed = torch.ones_like(scale_inv, dtype=torch.bool)
    for dtype in possible_roundings(weight.dtype):
        # unchecked: codes of finite values, and scales that have just been checked
        decoded = dequantize_blockwise(kept, scale_inv, block_size=block_size, dtype=dtype, check_values=False)
        decoded = decoded.to(weight.dtype)
        if torch.equal(decoded, weight):
            return kept, scale_inv
        changed &= _blocks(decoded != weight, block_size).any(-1).any(-2)
    fresh, fresh_scales = quantize_blockwise(weight, block_size=block_size, scale_fmt=scale_fmt, name=name)
    if changed.all():
        return fresh, fresh_scales
    old, new = (_blocks(codes.view(torch.uint8), block_size) for codes in (kept, fresh))
    mixed = torch.where(changed[..., :, None, :, None], new, old)
    rows, cols = weight.shape[-2:]
    codes = mixed.flatten(-4, -3).flatten(-2)[..., :rows, :cols].contiguous().view(kept.dtype)
    return codes, torch.where(changed, fresh_scales, scale_inv)


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """[..., row_blocks, block, col_blocks, block], edge blocks padded with zeros."""
    *experts, rows, cols = x.shape
    row_blocks, col_blocks = scale_grid((rows, cols), block_size)
    padded = torch.nn.functional.pad(x, (0, col_blocks * block_size - cols, 0, row_blocks * block_size - rows))
    return padded.view(*experts, row_blocks, block_size, col_blocks, block_size)
