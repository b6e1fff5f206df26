"""Codes, scales and weights for compiled.fp8, slices of them, both devices, and equality to the bit.

The GPU half of each test needs an NVIDIA GPU of compute capability 8.9 and is skipped without one.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from reference.fp8 import FP8, scale_grid
from support.checks import NO_GPU

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """-0.0 is not 0.0, and any NaN is NaN."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    found, wide = found.cpu(), torch.float32 if expected.dtype == FP8 else expected.dtype
    both_nan = found.to(wide).isnan() & expected.to(wide).isnan()
    equal_bits = found.contiguous().view(integer) == expected.contiguous().view(integer)
    return found.dtype == expected.dtype and bool((equal_bits | both_nan).all())


def source(shape: tuple[int, ...], block: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Any finite codes and scales from 2^-60 to 240; one of 256 would take a CPU's decoding out of what is compiled."""
    generator = np.random.default_rng(seed)
    codes = generator.choice(np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]), shape)
    scales = np.exp2(generator.uniform(-60, 7.9, scale_grid(shape, block))).astype(np.float32)
    return torch.from_numpy(codes).view(FP8), torch.from_numpy(scales)


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal values, each row on its own power of two, so that codes of all sizes occur."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp2(torch.randint(-12, 12, (*shape[:-1], 1), generator=generator))
    return (torch.randn(shape, generator=generator) * rows).to(dtype)


def sliced(codes: Tensor, scales: Tensor, rows: slice, cols: slice, block: int) -> dict:
    """The arguments for a slice of a weight, as the module's docstring says."""
    grid = [slice(s.start // block, -(-s.stop // block)) for s in (rows, cols)]
    offsets = {"row_offset": rows.start % block, "col_offset": cols.start % block}
    return {"weight": codes[..., rows, cols], "scale_inv": scales[..., *grid], "block_size": block, **offsets}


def damage(tensor: Tensor, where: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[where] = value
    return tensor
