"""FP8 checkpoints whose scales are as other tools write them, and what must come of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reference.fp8 import FP8
from support.checkpoints import SCALE, edit_config, edit_tensors

Tensors = dict[str, Tensor]


def scales_in(dtype: torch.dtype, every: int = 1) -> Callable[[Tensors], None]:
    """Of each `every`-th weight; rounded, so that the weights are others."""

    def apply(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(SCALE)][::every]:
            tensors[name] = tensors[name].to(dtype)

    return apply


def zeros(where: slice) -> Callable[[Tensors], None]:
    """Scales of 0 over codes of 0 of both signs, in these rows of blocks (of 128) of each weight."""

    def apply(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(SCALE)]:
            rows = torch.arange(len(tensors[name]))[where].tolist()
            codes = tensors[name.removesuffix(SCALE)].view(torch.uint8)
            for row in rows:
                codes[128 * row : 128 * row + 128] &= 0x80
            tensors[name][rows] = 0.0

    return apply


def both(*changes: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for change in changes:
            change(tensors)

    return apply


# What other tools write, and this project reads: made of a checkpoint as released.
KINDS: dict[str, Callable[[Tensors], None]] = {
    "bfloat16": scales_in(torch.bfloat16),
    "float16": scales_in(torch.float16),
    "e8m0": scales_in(torch.float8_e8m0fnu),
    "some bfloat16": scales_in(torch.bfloat16, 2),
    "bfloat16 and float16": both(scales_in(torch.bfloat16, 2), scales_in(torch.float16, 3)),
    "zeros in the first blocks": zeros(slice(0, 1)),
    "zeros in the last blocks": zeros(slice(-1, None)),
    "zeros everywhere": zeros(slice(None)),
    "zeros in float16": both(zeros(slice(0, 1)), scales_in(torch.float16)),
}


def as_other_tools(folder: Path, kind: str) -> Path:
    edit_tensors(folder, KINDS[kind])
    return folder


def written(tensors: Tensors) -> Tensors:
    """What an export of untouched weights writes: codes as they are, scales in float32."""
    return {name: value.float() if name.endswith(SCALE) else value for name, value in tensors.items()}


def claim(folder: Path, scale_fmt: str) -> Path:
    """Say `scale_fmt` in config.json, true or not."""
    edit_config(folder, lambda config: config["quantization_config"].update(scale_fmt=scale_fmt))
    return folder


def scales_of(tensors: Tensors) -> list[Tensor]:
    found = [value for name, value in tensors.items() if name.endswith(SCALE)]
    assert found
    return found


def powers_of_two(scales: list[Tensor]) -> list[bool]:
    """Of every scale, by its bits: no sign, and nothing after the leading one."""
    return [bool(bits & 0x807FFFFF == 0) for one in scales for bits in one.view(torch.int32).flatten().tolist()]


def quantized(tensors: Tensors) -> list[str]:
    return [name for name, value in tensors.items() if value.dtype == FP8]
