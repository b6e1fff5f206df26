"""FP8 blocks, fast: formulas and results, bit for bit, of `reference.fp8`; also for slices that start inside a block.

    value = float8 * scale_inv         formed in float32, rounded once

**Bytes.** Decoding n elements reads n bytes and writes n * itemsize (for bfloat16 3 n together); the scales add 1/4096
of n. The benchmarks compare with a copy that moves as many bytes.

**Slices.** Tensor parallelism need not cut weights at block borders: with 1536 rows on 8 ranks each has 192, so rank 1
starts 64 rows into block 1. A slice comes with the scales of exactly the blocks that it touches, and with where it
starts inside the first of them, `0 <= offset < block_size`. For rows `start:stop` of a weight:

    first, last = start // 128, -(-stop // 128)
    dequantize_blockwise(weight[start:stop], scale_inv[first:last], row_offset=start % 128)

**Checks.** A scale that is not finite and positive, or a NaN code, raises ValueError. NaN codes are found while
decoding, without a second pass; so `out` is written before the error is raised, and on CUDA each call waits for the
GPU. With `check_values=False` no call waits, NaN codes become NaN values, and the caller must know the scales to be
good. A scale of 0 over zeros is legal and rare: the fast check takes it for damage, and the reference's check, which
then decides, does not.

**Where.** On CPUs `compiled.fp8.cpu`, by torch.compile; on CUDA `compiled.fp8.kernels`, in Triton. Both compile at
first use, and the number of compilations does not grow with the number of shapes; each module says what it depends on.
In what torch traces, such as a function compiled with `fullgraph=True`, each call is an operator, by
`compiled.fp8.operators`.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import overload

import torch
from jaxtyping import Float, Float8e4m3fn, Float32
from torch import Tensor

from compiled.fp8 import cpu
from compiled.fp8.operators import traceable_dequantize, traceable_quantize
from reference.config import FP8_BLOCK, ScaleFormat
from reference.fp8 import FP8, check_codes, check_scale_values, divisors, fresh_scales, scale_grid, zero_blocks


@overload
def dequantize_blockwise(
    weight: Float8e4m3fn[Tensor, "*experts rows cols"],
    scale_inv: Float32[Tensor, "*experts row_blocks col_blocks"],
    *,
    block_size: int = FP8_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
    out: Float[Tensor, "*experts rows cols"] | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
    check_values: bool = True,
    name: str = "weight",
) -> Float[Tensor, "*experts rows cols"]: ...
@overload
def dequantize_blockwise(
    weight: Float8e4m3fn[Tensor, "experts rows cols"],
    scale_inv: Float32[Tensor, "experts row_blocks col_blocks"],
    *,
    block_size: int = FP8_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
    out: Sequence[Float[Tensor, "rows cols"]],
    row_offset: int = 0,
    col_offset: int = 0,
    check_values: bool = True,
    name: str = "weight",
) -> Sequence[Float[Tensor, "rows cols"]]: ...
@traceable_dequantize
def dequantize_blockwise(
    weight: Float8e4m3fn[Tensor, "*experts rows cols"],
    scale_inv: Float32[Tensor, "*experts row_blocks col_blocks"],
    *,
    block_size: int = FP8_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
    out: Float[Tensor, "*experts rows cols"] | Sequence[Float[Tensor, "rows cols"]] | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
    check_values: bool = True,
    name: str = "weight",
) -> Float[Tensor, "*experts rows cols"] | Sequence[Float[Tensor, "rows cols"]]:
    """value = float8 * scale_inv of its block, formed in float32 (float64 for a float64 result), rounded once.

    `out`, if given, receives the values and is returned: any view of `dtype`, or for a stack a list of one for each
    expert. `row_offset` and `col_offset` are where `weight` starts inside the first block of `scale_inv`. `name` is the
    tensor's name in errors.

    Raises:
        ValueError: the scales do not cover exactly the blocks touched, a dtype, a device or `out` does not fit, a scale
            is not finite and positive (nor 0 over zeros), or a code is NaN.
    """
    if weight.dtype != FP8:
        raise ValueError(f"{name}: found {weight.dtype}, expected {FP8}; pass the codes as they are stored")
    _check_scales(weight, scale_inv, block_size, row_offset, col_offset, name)
    if isinstance(out, Sequence):
        _check_results(out, weight, dtype, name)
    else:
        out = _result(out, weight, dtype, name)
    if weight.is_cuda:
        result = _stack(out) if isinstance(out, Tensor) else [one.detach() for one in out]
        operands = (_stack(weight), _stack(scale_inv), result, block_size, row_offset, col_offset)
        if not _launch("dequantize", *operands, dtype=dtype, check=check_values):
            _check_scale_values(weight, scale_inv, block_size, row_offset, col_offset, name)
            check_codes(weight, name=name)
        return out
    if check_values and not valid_scales(scale_inv):
        _check_scale_values(weight, scale_inv, block_size, row_offset, col_offset, name)
    matrices = [(weight, scale_inv, out)] if isinstance(out, Tensor) else zip(weight, scale_inv, out, strict=True)
    for codes, scales, values in matrices:
        if cpu.decode(_stack(codes), _stack(scales), _stack(values), block_size, row_offset, col_offset):
            if check_values:
                check_codes(weight, name=name)
            values.detach().masked_fill_(codes.isnan(), torch.nan)
    return out


@traceable_quantize
def quantize_blockwise(
    weight: Float[Tensor, "*experts rows cols"],
    *,
    block_size: int = FP8_BLOCK,
    scale_inv: Float32[Tensor, "*experts row_blocks col_blocks"] | None = None,
    scale_fmt: ScaleFormat = "float",
    out: Float8e4m3fn[Tensor, "*experts rows cols"] | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
    check_values: bool = True,
    name: str = "weight",
) -> tuple[Float8e4m3fn[Tensor, "*experts rows cols"], Float32[Tensor, "*experts row_blocks col_blocks"]]:
    """float8 = round(weight / scale_inv), with scale_inv = amax(block) / 448 where none is given.

    With `scale_fmt` "ue8m0" fresh scales are rounded up to powers of two (`reference.fp8.fresh_scales`). With
    `scale_inv`, values beyond +-448 * scale saturate. A slice that starts inside a block needs given scales, since it
    does not have the whole block that an amax is taken of. `out`, if given, receives the codes.

    Raises:
        ValueError: as in `dequantize_blockwise`, or the weight holds a value that is not finite.
    """
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ValueError(f"{name}: found {weight.dtype}, expected bfloat16, float16, float32 or float64")
    if scale_inv is None:
        if row_offset or col_offset:
            raise ValueError(
                f"{name}: starts at row {row_offset}, column {col_offset} of a block, and no scale_inv is given; a "
                "scale is made from a whole block: give the scales, or quantise before slicing"
            )
        _check_matrix(weight, name)
        kernel, scale_inv = "quantize_afresh", _fresh_scales(weight, block_size, scale_fmt)
    else:
        kernel = "quantize"
    _check_scales(weight, scale_inv, block_size, row_offset, col_offset, name)
    codes = _result(out, weight, FP8, name)
    blocks = block_size, row_offset, col_offset
    if weight.is_cuda:
        launch = partial(_launch, dtype=weight.dtype, powers_of_two=scale_fmt == "ue8m0")
        if not launch(kernel, _stack(weight), _stack(scale_inv), _stack(codes), *blocks, check=check_values):
            _check_finite(weight, name)
            _check_scale_values(weight, scale_inv, *blocks, name)
            launch("quantize", _stack(weight), _stack(divisors(scale_inv)), _stack(codes), *blocks, check=False)
        return codes, scale_inv
    damaged, used = _holds_infinite(weight), scale_inv
    if check_values and damaged:
        _check_finite(weight, name)
    if check_values and not valid_scales(scale_inv):
        _check_scale_values(weight, scale_inv, *blocks, name)
        used = divisors(scale_inv)
    cpu.encode(_stack(weight), _stack(used), _stack(codes), *blocks)
    if damaged:
        codes.detach().view(torch.uint8).masked_fill_(weight.isnan(), 0x7F)
    return codes, scale_inv


# ------------------------------------------------------------------------------------------------------------- checks


def valid_scales(scale_inv: Float32[Tensor, "..."]) -> bool:
    """Whether all scales are finite and positive. Waits for the GPU if they are on one.

    A question to the host: no function that is compiled with `fullgraph=True` can ask it.
    """
    if not scale_inv.numel():
        return True
    least, greatest = scale_inv.aminmax()  # NaN if one is
    return 0 < least.item() <= greatest.item() < math.inf


def _check_matrix(weight: Tensor, name: str) -> None:
    if weight.ndim not in (2, 3):
        raise ValueError(f"{name}: found shape {list(weight.shape)}, expected [rows, cols] or [experts, rows, cols]")


def _check_scales(weight: Tensor, scale_inv: Tensor, block: int, row_offset: int, col_offset: int, name: str) -> None:
    _check_matrix(weight, name)
    if not (0 <= row_offset < block and 0 <= col_offset < block):
        raise ValueError(
            f"{name}: found row_offset {row_offset} and col_offset {col_offset}, expected 0 <= offset < {block}; give "
            "the scales of the blocks that the slice touches, and where it starts inside the first of them"
        )
    *experts, rows, cols = weight.shape
    expected = scale_grid((*experts, row_offset + rows, col_offset + cols), block)
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"{name}_scale_inv: found a grid of {list(scale_inv.shape)} scales, expected {list(expected)} for a weight "
            f"of {list(weight.shape)} that starts at row {row_offset}, column {col_offset} of its first block of "
            f"{block}x{block}; give the scales of exactly the blocks that the weight touches"
        )
    if scale_inv.dtype != torch.float32 or scale_inv.device != weight.device:
        raise ValueError(
            f"{name}_scale_inv: found {scale_inv.dtype} on {scale_inv.device}, expected torch.float32 on "
            f"{weight.device}; scales must not be rounded"
        )


def _check_scale_values(
    weight: Tensor, scale_inv: Tensor, block_size: int, row_offset: int, col_offset: int, name: str
) -> None:
    zeros = zero_blocks(weight.detach(), block_size=block_size, row_offset=row_offset, col_offset=col_offset)
    check_scale_values(scale_inv, zeros, name=name)


def _holds_infinite(weight: Tensor) -> bool:
    """Whether a value is infinite or NaN: the extremes of a tensor that holds NaN are NaN."""
    return weight.numel() > 0 and not all(math.isfinite(extreme.item()) for extreme in weight.detach().aminmax())


def _check_finite(weight: Tensor, name: str) -> None:
    bad = ~torch.isfinite(weight)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}: value at {where} is {weight[tuple(where)].item()}, expected finite values")


def _result(out: Tensor | None, weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if out is None:
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if (out.shape, out.dtype, out.device) != (weight.shape, dtype, weight.device):
        raise ValueError(
            f"{name}: found out of {list(out.shape)}, {out.dtype} on {out.device}, expected {list(weight.shape)}, "
            f"{dtype} on {weight.device}"
        )
    return out


def _check_results(out: Sequence[Tensor], weight: Tensor, dtype: torch.dtype, name: str) -> None:
    if weight.ndim != 3 or len(out) != len(weight):
        raise ValueError(
            f"{name}: found {len(out)} tensors as out for a weight of {list(weight.shape)}, expected one for each of "
            "[experts, rows, cols]"
        )
    for codes, one in zip(weight, out, strict=True):
        _result(one, codes, dtype, name)


def _stack(x: Tensor) -> Tensor:
    """[experts, rows, cols], sharing memory, detached from autograd."""
    return x.detach() if x.ndim == 3 else x.detach()[None]


def _fresh_scales(weight: Tensor, block_size: int, scale_fmt: ScaleFormat) -> Tensor:
    """Made from each block's amax; on CUDA empty, for the kernel to fill."""
    *experts, rows, cols = weight.shape
    grid = scale_grid(weight.shape, block_size)
    if weight.is_cuda:
        return torch.empty(grid, dtype=torch.float32, device=weight.device)
    row_blocks, col_blocks = grid[-2:]
    missing = (0, col_blocks * block_size - cols, 0, row_blocks * block_size - rows)
    values = weight.detach().abs()
    if any(missing):
        values = torch.nn.functional.pad(values, missing)
    amax = values.view(*experts, row_blocks, block_size, col_blocks * block_size).amax(-2)
    return fresh_scales(amax.view(*grid, block_size).amax(-1).to(torch.float32), scale_fmt)


def _launch(
    kernel: str,
    source: Tensor,
    scale_inv: Tensor,
    result: Tensor | list[Tensor],
    block_size: int,
    row_offset: int,
    col_offset: int,
    *,
    dtype: torch.dtype,
    check: bool,
    powers_of_two: bool = False,
) -> bool:
    """Run a kernel of `compiled.fp8.kernels`. False if it checked and found a bad code, value or scale."""
    from compiled.fp8 import kernels  # needs Triton, which needs no GPU but is not everywhere

    if not source.numel():
        return True
    wide = torch.promote_types(dtype, torch.float32)
    damaged = torch.zeros(1, dtype=torch.int32, device=source.device) if check else None
    with torch.cuda.device(source.device):
        kernels.launch(
            getattr(kernels, kernel), source, scale_inv, result, damaged, block_size, row_offset, col_offset, wide,
            powers_of_two=powers_of_two,
        )  # fmt: skip
    return damaged is None or not damaged.item()
