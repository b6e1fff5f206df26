"""How a written checkpoint stores its weights: what its config.json says, and which of its weights are float8.

Where the source has float8 weights, these are float8 again and no others are; else config.json's rule decides
(`reference.quantization`). The source's own section of config.json is written back as it is.
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.writer import FilePlan, TensorPlan
from bridge.jobs.ranks import is_rank_zero
from reference.checkpoint import SCALE_SUFFIX
from reference.config import ModelConfig, QuantizationConfig
from reference.fp8 import FP8, scale_grid
from reference.quantization import is_excluded, quantized_names

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


class StoragePlan(NamedTuple):
    """How a checkpoint is written: config.json (as given, unless it has to differ), and the names of float8 weights."""

    quantization: Quantization  # what was asked for
    config_json: dict[str, Any]
    config: ModelConfig
    quantized: frozenset[str]

    def stored_tensors(self, name: str, shape: tuple[int, ...], plain_dtype: torch.dtype) -> dict[str, TensorPlan]:
        """A weight as it goes on disk: float8 and its scales where it is quantised, else `plain_dtype`."""
        if name not in self.quantized:
            return {name: TensorPlan(torch.bfloat16 if plain_dtype == FP8 else plain_dtype, shape)}
        grid = scale_grid(shape, self.config.block_size)
        return {name: TensorPlan(FP8, shape), name + SCALE_SUFFIX: TensorPlan(torch.float32, grid)}

    def check(self, files: Iterable[FilePlan], carried: Collection[str]) -> None:
        """What is about to be written is what was asked for: some float8, or none; `carried` tensors do not count.

        Raises:
            ValueError: it is not.
        """
        planned = {name for file in files for name, plan in file.tensors.items() if plan.dtype == FP8}
        if bool(planned.difference(carried)) != (self.quantization == "fp8"):
            raise ValueError(
                f"quantization {self.quantization!r} was asked for, and {len(planned)} weights would be float8"
            )


def storage_plan(
    config_json: dict[str, Any], quantization: Quantization, in_source: frozenset[str] = frozenset()
) -> StoragePlan:
    """How to write a checkpoint that comes from one with this config.json and these float8 weights.

    Without, no key says float8: a `dtype` that did says bfloat16.

    Raises:
        ValueError: `quantization` is neither "fp8" nor "none", or it is "fp8" and config.json excludes every weight.
    """
    if quantization not in ("fp8", "none"):
        raise ValueError(f"quantization must be 'fp8' or 'none', found {quantization!r}")
    has_section = bool(config_json.get(SECTION))
    if quantization == "none":
        written = without_quantization(config_json)
        return StoragePlan(quantization, written, ModelConfig.from_hf(written), frozenset())
    written = config_json if has_section else config_json | {SECTION: FP8_SECTION}
    config = ModelConfig.from_hf(written)
    by_rule = quantized_names(config) if not (in_source and has_section) else frozenset()
    quantized = in_source or by_rule
    if not has_section and quantized != by_rule:
        written = config_json | {SECTION: FP8_SECTION | {"modules_to_not_convert": _excluding(config, quantized)}}
        config = ModelConfig.from_hf(written)
    if not quantized:
        raise ValueError(
            f"float8 was asked for, and {SECTION}.modules_to_not_convert excludes every weight; shorten the list, or "
            "ask for bfloat16"
        )
    return StoragePlan(quantization, written, config, quantized)


def without_quantization(config_json: dict[str, Any]) -> dict[str, Any]:
    """The same object if no key says float8; else without the section, and a `dtype` that said so is bfloat16."""
    plain = {key: value for key, value in config_json.items() if key != SECTION or not value}
    said = [key for key in DTYPE_KEYS if any(word in str(config_json.get(key)).lower() for word in ("float8", "fp8"))]
    plain |= dict.fromkeys(said, "bfloat16")
    return config_json if plain == config_json else plain


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


def _excluding(config: ModelConfig, quantized: frozenset[str]) -> list[str]:
    """A list of modules under which the rule quantises what the source has as float8, and nothing else."""
    usual = QuantizationConfig().modules_to_not_convert
    kept = [module for module in usual if not any(is_excluded(_module(name), (module,)) for name in quantized)]
    every = replace(config, quantization=QuantizationConfig(modules_to_not_convert=tuple(kept)))
    return kept + sorted(_module(name) for name in quantized_names(every) - quantized)


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
