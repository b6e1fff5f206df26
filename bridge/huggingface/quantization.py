"""What a written checkpoint's config.json says, and the dtype each of its tensors has."""

from typing import Any, Literal

import torch

from bridge.huggingface.writer import TensorPlan
from reference.checkpoint import SCALE_SUFFIX, is_quantized
from reference.config import ModelConfig, QuantizationConfig
from reference.fp8 import FP8, scale_grid

Quantization = Literal["fp8", "none"]

FP8_SECTION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [QuantizationConfig().block_size] * 2,
    "modules_to_not_convert": list(QuantizationConfig().modules_to_not_convert),
}


def target_config(raw: dict[str, Any], quantization: Quantization) -> dict[str, Any]:
    """A config.json for weights stored with or without quantisation: the same object unless it has to differ.

    Raises:
        ValueError: `quantization` is neither "fp8" nor "none".
    """
    if quantization not in ("fp8", "none"):
        raise ValueError(f"quantization must be 'fp8' or 'none', found {quantization!r}")
    if (quantization == "fp8") == ("quantization_config" in raw):
        return raw
    if quantization == "fp8":
        return raw | {"quantization_config": FP8_SECTION}
    return {key: value for key, value in raw.items() if key != "quantization_config"}


def stored_tensors(
    name: str, shape: tuple[int, ...], target: ModelConfig, plain_dtype: torch.dtype
) -> dict[str, TensorPlan]:
    """A weight as it goes on disk: float8 and its scales where `target` quantises it, else `plain_dtype`."""
    if not is_quantized(name, target):
        return {name: TensorPlan(torch.bfloat16 if plain_dtype == FP8 else plain_dtype, shape)}
    assert target.quantization is not None
    grid = scale_grid(shape, target.quantization.block_size)
    return {name: TensorPlan(FP8, shape), name + SCALE_SUFFIX: TensorPlan(torch.float32, grid)}
