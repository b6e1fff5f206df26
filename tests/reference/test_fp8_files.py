"""Block scales as files have them: narrow dtypes, zeros over zeros, powers of two; and weights that were widened.

The truth is float64, in which the products and quotients here are exact or compared without rounding.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checks import without_type_checks
from support.oracles import BFLOAT16, FLOAT32, FLOAT64

from reference.fp8 import (
    FP8,
    FP8_MAX,
    are_powers_of_two,
    dequantize_blockwise,
    float32_scales,
    possible_roundings,
    quantize_blockwise,
    requantize_blockwise,
    scale_grid,
    zero_blocks,
)

BLOCK = 16


def codes_and_scales(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(shape, generator=generator).to(FP8)
    return codes, torch.exp2(torch.empty(scale_grid(shape, BLOCK)).uniform_(-9, 3, generator=generator))


def bits(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


# ------------------------------------------------------------------------------------------------------------ dtypes


def finite_values(dtype: torch.dtype) -> torch.Tensor:
    """Every finite positive value of an 8-bit or 16-bit dtype."""
    raw = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
    values = raw.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype)
    wide = values.to(FLOAT64)
    return values[wide.isfinite() & (wide > 0)]


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16, torch.float8_e8m0fnu], ids=str)
def test_narrow_scales_are_exact_in_float32(dtype):
    narrow = finite_values(dtype)
    assert len(narrow) == {BFLOAT16: 0x7F7F, torch.float16: 0x7BFF, torch.float8_e8m0fnu: 255}[dtype]
    wide = float32_scales(narrow)
    assert wide.dtype == FLOAT32
    assert torch.equal(wide.to(FLOAT64), narrow.to(FLOAT64))
    if dtype == torch.float8_e8m0fnu:
        assert wide.tolist() == [2.0**power for power in range(-127, 128)]


def test_float32_scales_are_passed_on():
    scales = torch.ones(2, 2)
    assert float32_scales(scales) is scales


# ------------------------------------------------------------------------------------------------------------- zeros


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32, FLOAT64])
@pytest.mark.parametrize("shape", [(40, 24), (16, 16), (5, 3), (2, 20, 33), (2, 2, 3, 17)])
def test_a_scale_of_zero_over_zeros_means_zeros(shape, dtype):
    """Zeros of either sign, in every second block; their signs, bytes and scales come back."""
    codes, scales = codes_and_scales(shape)
    here = (torch.arange(scales.numel()) % 2 == 0).view(scales.shape)
    scales[here] = 0.0
    inside = here.repeat_interleave(BLOCK, -2)[..., : shape[-2], :].repeat_interleave(BLOCK, -1)[..., : shape[-1]]
    signs = torch.where(torch.arange(codes.numel()).view(shape) % 3 == 0, 0x80, 0).to(torch.uint8)
    codes = torch.where(inside, signs, bits(codes)).view(FP8)

    values = dequantize_blockwise(codes, scales, block_size=BLOCK, dtype=dtype)
    assert not values[inside].any()
    assert torch.equal(values[inside].signbit(), signs[inside] == 0x80)
    assert torch.equal(values[~inside].signbit(), (bits(codes) >= 0x80)[~inside])
    for encode in (quantize_blockwise, requantize_blockwise):
        again, kept = encode(values, scale_inv=scales, block_size=BLOCK)
        assert torch.equal(bits(again), bits(codes))
        assert torch.equal(kept, scales)


@pytest.mark.parametrize("value", [1e-30, -3.0, 3e38])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_a_value_in_a_block_whose_scale_was_zero_gets_a_fresh_scale(value, scale_fmt):
    weight = torch.zeros(40, 24)
    weight[39, 20] = value
    codes, scales = requantize_blockwise(weight, torch.zeros(3, 2), block_size=BLOCK, scale_fmt=scale_fmt)
    _, fresh = quantize_blockwise(weight, block_size=BLOCK, scale_fmt=scale_fmt)
    assert scales.flatten()[:-1].tolist() == [0.0] * 5
    assert scales[2, 1] == fresh[2, 1] > 0
    found = codes[39, 20].double() * scales[2, 1].double()
    assert abs(found - weight[39, 20].double()) <= 2.0**-4 * abs(value)
    assert int(bits(codes).count_nonzero()) == 1


@settings(max_examples=30, deadline=None, database=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 15), st.integers(0, 15), st.integers(0, 2**32))
def test_zero_blocks_of_a_slice(rows, cols, row_offset, col_offset, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(rows, cols, generator=generator) < 0.01).to(torch.float32)
    weight[weight == 0] = -0.0
    grid = scale_grid((row_offset + rows, col_offset + cols), BLOCK)
    found = zero_blocks(weight, block_size=BLOCK, row_offset=row_offset, col_offset=col_offset)
    assert found.shape == grid
    wanted = torch.ones(grid, dtype=torch.bool)
    for row, col in weight.nonzero().tolist():
        wanted[(row + row_offset) // BLOCK, (col + col_offset) // BLOCK] = False
    assert torch.equal(found, wanted)
    codes = zero_blocks(weight.to(FP8), block_size=BLOCK, row_offset=row_offset, col_offset=col_offset)
    assert torch.equal(codes, wanted)


# ----------------------------------------------------------------------------------------------------- powers of two


def power_of_two(amax: float) -> float:
    """In float64, whose 53 bits tell apart what float32's 24 cannot: amax / 448 is never rounded across a power."""
    return 2.0 ** max(-126, math.ceil(math.log2(amax / FP8_MAX))) if amax else 1.0


def edges(dtype: torch.dtype) -> list[float]:
    """448 * 2^n for all n, and the neighbours; the dtype's least and greatest values; 0."""
    middle = torch.tensor([FP8_MAX * 2.0**power for power in range(-157, 119)], dtype=FLOAT64).to(dtype)
    beside = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (-torch.inf, torch.inf)]
    ends = torch.tensor([0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max], dtype=dtype)
    return torch.cat([middle, *beside, ends]).double().clamp(min=0).tolist()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_powers_of_two_by_float64(dtype):
    law = without_type_checks("reference.fp8")
    for amax in edges(dtype):
        weight = torch.tensor([[amax, -amax / 3, 0.0]], dtype=dtype)
        codes, scales = law.quantize_blockwise(weight, scale_fmt="ue8m0")
        assert scales.item() == power_of_two(amax), amax
        quotient = weight.double() / scales.double()
        assert quotient.abs().max() <= FP8_MAX, "nothing saturates"
        assert torch.equal(codes.double(), quotient.to(FLOAT32).to(FP8).double())


@pytest.mark.parametrize("scale", [0.3, 1.5, -0.5, -1.0, -0.0, 3.0, 2.0**-126 * 1.25, 448.0, math.nan, math.inf])
def test_scales_that_are_no_powers_of_two(scale):
    scales = torch.tensor([[1.0, 0.0, 2.0**-126], [2.0**127, scale, 2.0**-127]])
    assert not are_powers_of_two(scales)
    scales[1, 1] = 0.5
    assert are_powers_of_two(scales)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32, FLOAT64])
@pytest.mark.parametrize("shape", [(300, 200), (2, 3, 17, 9), (1, 1), (2, 130, 140)])
def test_every_fresh_scale_is_a_power_of_two(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp2(torch.randint(-20, 20, (*shape[:-1], 1), generator=generator))
    weight = (torch.randn(shape, generator=generator) * sizes).to(dtype)
    weight[..., :BLOCK, -BLOCK:] = 0
    codes, scales = quantize_blockwise(weight, block_size=BLOCK, scale_fmt="ue8m0")
    rows, cols = shape[-2:]
    for at in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
        *index, r, c = at
        block = weight[*index, r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK].double()
        assert scales[tuple(at)].item() == power_of_two(block.abs().max().item())
    decoded = dequantize_blockwise(codes, scales, block_size=BLOCK, dtype=FLOAT64)
    # Half a unit in the last of e4m3's places; below the scale's 2^-6, half of 2^-9.
    spread = scales.double().repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :cols]
    assert (
        (decoded - weight.double()).abs() <= torch.maximum(weight.double().abs() * 2.0**-4, spread * 2.0**-10)
    ).all()


def test_requantise_keeps_powers_of_two_and_makes_powers_of_two():
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)
    codes, scales = quantize_blockwise(weight, block_size=BLOCK, scale_fmt="ue8m0")
    decoded = dequantize_blockwise(codes, scales, block_size=BLOCK)
    decoded[20, 3] = 55.5
    again, mixed = requantize_blockwise(decoded, scales, block_size=BLOCK, scale_fmt="ue8m0")
    assert mixed[1, 0] == power_of_two(55.5)
    mixed[1, 0] = scales[1, 0]
    assert torch.equal(mixed, scales)
    assert torch.equal(bits(again)[32:], bits(codes)[32:])


# --------------------------------------------------------------------------------------------------- widened weights


def test_what_a_weight_may_have_been_decoded_to():
    assert possible_roundings(BFLOAT16) == (BFLOAT16,)
    assert possible_roundings(torch.float16) == (torch.float16,), "it does not hold every bfloat16"
    assert possible_roundings(FLOAT32) == (FLOAT32, BFLOAT16)
    assert possible_roundings(FLOAT64) == (FLOAT64, BFLOAT16, FLOAT32)


@pytest.mark.parametrize("held", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("through", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("shape", [(40, 24), (2, 20, 33)])
def test_a_widened_weight_is_untouched(shape, through, held):
    codes, scales = codes_and_scales(shape)
    decoded = dequantize_blockwise(codes, scales, block_size=BLOCK, dtype=through)
    exact = dequantize_blockwise(codes, scales, block_size=BLOCK, dtype=FLOAT64)
    assert (decoded.double() != exact).any(), "it was rounded, or this shows nothing"
    again, kept = requantize_blockwise(decoded.to(held), scales, block_size=BLOCK)
    assert torch.equal(bits(again), bits(codes))
    assert torch.equal(kept, scales)


def test_each_block_of_a_widened_weight_is_judged_by_itself():
    """One block in float32, one rounded to bfloat16, one changed by less than bfloat16 tells apart."""
    codes, scales = codes_and_scales((16, 48))
    exact = dequantize_blockwise(codes, scales, block_size=BLOCK, dtype=FLOAT32)
    weight = exact.clone()
    weight[:, 16:] = weight[:, 16:].to(BFLOAT16).to(FLOAT32)
    row = int(weight[:, 40].abs().argmax())
    weight[row, 40] = torch.nextafter(weight[row, 40], torch.tensor(torch.inf))
    again, mixed = requantize_blockwise(weight, scales, block_size=BLOCK)
    assert (mixed != scales).tolist() == [[False, False, True]]
    assert torch.equal(bits(again)[:, :32], bits(codes)[:, :32])
