"""FP8 blocks: float8 codes and their block scales, decoded and encoded."""

from compiled.fp8.blockwise import dequantize_blockwise, quantize_blockwise, valid_scales
from compiled.fp8.requantize import requantize_blockwise

__all__ = ["dequantize_blockwise", "quantize_blockwise", "requantize_blockwise", "valid_scales"]
