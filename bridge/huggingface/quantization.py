"""What a written checkpoint's config.json says, and the dtype each of its tensors has."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.writer import TensorPlan
from bridge.jobs.ranks import is_rank_zero
from reference.checkpoint import SCALE_SUFFIX, is_quantized
from reference.config import ModelConfig, QuantizationConfig
from reference.fp8 import FP8, scale_grid

Quantization = Literal["fp8", "none"]

_log = logging.getLogger(__name__)

SECTION = "quantization_config"
DTYPE_KEYS = ("dtype", "torch_dtype")
FP8_SECTION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [QuantizationConfig().block_size] * 2,
    "modules_to_not_convert": list(QuantizationConfig().modules_to_not_convert),
}


def target_config(raw: dict[str, Any], quantization: Quantization) -> dict[str, Any]:
    """A config.json for weights stored with or without quantisation: the same object unless it has to differ.

    Without, no key says float8: a `dtype` that did says bfloat16.

    Raises:
        ValueError: `quantization` is neither "fp8" nor "none".
    """
    if quantization not in ("fp8", "none"):
        raise ValueError(f"quantization must be 'fp8' or 'none', found {quantization!r}")
    if quantization == "fp8":
        return raw if SECTION in raw else raw | {SECTION: FP8_SECTION}
    plain = {key: value for key, value in raw.items() if key != SECTION}
    said = [key for key in DTYPE_KEYS if any(word in str(raw.get(key)).lower() for word in ("float8", "fp8"))]
    plain |= dict.fromkeys(said, "bfloat16")
    return raw if plain == raw else plain


def with_true_scale_format(
    config_json: dict[str, Any] | Path, source: HuggingFaceCheckpoint, scales: Literal["source", "fresh"]
) -> dict[str, Any] | Path:
    """The config.json of a checkpoint whose float8 weights come from `source`, in which `scale_fmt` holds or is gone.

    Fresh scales are what `scale_fmt` says. Scales that are kept need not be: then the key goes, which is logged.
    """
    false = source.false_scale(scales)
    if false is None:
        return config_json
    raw = source.files.config_json
    if is_rank_zero():
        _log.warning(
            "%s: %s is no power of two, though scale_fmt in config.json says 'ue8m0'; the scales are kept as they are, "
            "and scale_fmt is left out of the new config.json",
            source.files.folder,
            false,
        )
    return raw | {SECTION: {key: value for key, value in raw[SECTION].items() if key != "scale_fmt"}}


def stored_tensors(
    name: str, shape: tuple[int, ...], target: ModelConfig, plain_dtype: torch.dtype
) -> dict[str, TensorPlan]:
    """A weight as it goes on disk: float8 and its scales where `target` quantises it, else `plain_dtype`."""
    if not is_quantized(name, target):
        return {name: TensorPlan(torch.bfloat16 if plain_dtype == FP8 else plain_dtype, shape)}
    assert target.quantization is not None
    grid = scale_grid(shape, target.quantization.block_size)
    return {name: TensorPlan(FP8, shape), name + SCALE_SUFFIX: TensorPlan(torch.float32, grid)}
