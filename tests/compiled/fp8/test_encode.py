"""compiled.fp8 encodes as reference.fp8 does, bit for bit: on fresh and given scales, shards, ties, every bfloat16, and
back to the source's bytes; and what it refuses.
"""

import pytest
import torch
from support.fp8_cases import damage, on_each_device, same_bits, sliced, source, weights

from compiled.fp8 import cpu, dequantize_blockwise, quantize_blockwise
from reference import fp8 as reference
from reference.fp8 import FP8

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@on_each_device
@pytest.mark.parametrize(
    ("shape", "block", "dtype"), [((300, 200), 128, BF16), ((3, 136, 256), 128, BF16), ((300, 200), 128, F32)]
)
def test_quantise_is_the_reference(shape, block, dtype, device):
    weight = weights(shape, dtype)
    weight[..., :block, :block] = 0
    codes, scales = reference.quantize_blockwise(weight, block_size=block)
    found_codes, found_scales = quantize_blockwise(weight.to(device), block_size=block)
    assert same_bits(found_scales, scales)
    assert same_bits(found_codes, codes)
    given_scales = scales * 0.3  # some values saturate
    codes, _ = reference.quantize_blockwise(weight, block_size=block, scale_inv=given_scales)
    found_codes, found_scales = quantize_blockwise(
        weight.to(device), block_size=block, scale_inv=given_scales.to(device)
    )
    assert same_bits(found_codes, codes)
    assert same_bits(found_scales, given_scales)


@on_each_device
def test_quantise_shards_on_the_scales_of_the_whole(device):
    weight = weights((1536, 256))
    codes, scales = reference.quantize_blockwise(weight)
    found = torch.zeros(1536, 256, dtype=torch.uint8, device=device).view(FP8)
    for start in range(0, 1536, 192):
        rows, everything = slice(start, start + 192), slice(0, 256)
        shard = sliced(weight.to(device), scales.to(device), rows, everything, 128)
        assert quantize_blockwise(**shard, out=found[rows])[0].data_ptr() == found[rows].data_ptr()
    assert same_bits(found, codes)


@on_each_device
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_quotients_on_and_beside_the_middle_between_two_codes(dtype, device):
    """Where any quotient but float32's own would fall to the other code; scales from 2^-140 to 2^120, and -0.0."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp2(torch.empty(16, 16).uniform_(-140, 120, generator=generator))
    middle = torch.randint(-4000, 4000, (256, 256), generator=generator) / 64
    middle *= torch.exp2(torch.randint(-8, 4, (256, 256), generator=generator))
    weight = middle * scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
    beside = torch.tensor([-torch.inf, 0.0, torch.inf])[torch.randint(3, (256, 256), generator=generator)]
    weight = torch.where(beside == 0, weight, torch.nextafter(weight, beside)).nan_to_num(0, 0, 0)
    weight[:, ::37] = -0.0
    weight = weight.to(dtype).nan_to_num(0, 0, 0)
    codes, _ = reference.quantize_blockwise(weight, block_size=16, scale_inv=scales)
    found, _ = quantize_blockwise(weight.to(device), block_size=16, scale_inv=scales.to(device))
    assert same_bits(found, codes)


@on_each_device
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_fresh_scales_of_blocks_of_every_size(dtype, device):
    """Down to blocks whose scale is subnormal, or zero and so taken for 1."""
    sizes = torch.exp2(torch.linspace(-149, 100, 64)).view(8, 8)
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    weight = (weight * sizes.repeat_interleave(16, 0).repeat_interleave(16, 1)).to(dtype)
    codes, scales = reference.quantize_blockwise(weight, block_size=16)
    found_codes, found_scales = quantize_blockwise(weight.to(device), block_size=16)
    assert same_bits(found_scales, scales)
    assert same_bits(found_codes, codes)


@on_each_device
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_powers_of_two_are_the_references(dtype, device):
    """Blocks on, just below and just above 448 * 2^n for all n; blocks of zeros, and of the least numbers there are."""
    block, powers = 4, torch.arange(-157, 119).view(12, 23)
    amax = (448 * torch.exp2(powers.double())).to(dtype)
    beside = [torch.nextafter(amax, torch.full_like(amax, to)) for to in (-torch.inf, torch.inf)]
    amax = torch.cat([amax, *beside]).abs()
    amax[0, :2], amax[1, 0] = 0, 2.0**-149
    weight = torch.rand(amax.shape[0] * block, amax.shape[1] * block, generator=torch.Generator().manual_seed(0))
    weight = (weight.to(dtype) - 0.5) * amax.repeat_interleave(block, 0).repeat_interleave(block, 1)
    weight[1::block, 2::block] = -amax
    codes, scales = reference.quantize_blockwise(weight, block_size=block, scale_fmt="ue8m0")
    assert len(scales.unique()) > 200
    found_codes, found_scales = quantize_blockwise(weight.to(device), block_size=block, scale_fmt="ue8m0")
    assert same_bits(found_scales, scales)
    assert same_bits(found_codes, codes)


@on_each_device
@pytest.mark.parametrize(
    ("shape", "dtype"), [((300, 200), BF16), ((3, 136, 256), BF16), ((300, 200), F32), ((1, 1), F32), ((0, 4), BF16)]
)
def test_powers_of_two_for_every_shape(shape, dtype, device):
    weight = weights(shape, dtype)
    codes, scales = reference.quantize_blockwise(weight, scale_fmt="ue8m0")
    found_codes, found_scales = quantize_blockwise(weight.to(device), scale_fmt="ue8m0")
    assert same_bits(found_scales, scales)
    assert same_bits(found_codes, codes)
    given_scales = scales * 0.3  # the format is that of fresh scales
    codes, _ = reference.quantize_blockwise(weight, scale_inv=given_scales)
    found_codes, _ = quantize_blockwise(weight.to(device), scale_inv=given_scales.to(device), scale_fmt="ue8m0")
    assert same_bits(found_codes, codes)


@on_each_device
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("shape", [(40, 24), (2, 20, 33)])
def test_zeros_on_a_scale_of_zero(shape, dtype, device):
    """Codes of 0 with the values' signs; a value there is an error; and other blocks are as ever."""
    weight = weights(shape, dtype)
    weight[..., :16, :16] = 0
    weight[..., 3:9, :16] = -0.0
    _, scales = reference.quantize_blockwise(weight, block_size=16)
    scales[..., 0, 0] = 0
    codes, _ = reference.quantize_blockwise(weight, block_size=16, scale_inv=scales)
    found_codes, found_scales = quantize_blockwise(weight.to(device), block_size=16, scale_inv=scales.to(device))
    assert same_bits(found_codes, codes)
    assert same_bits(found_scales, scales)
    weight[..., 15, 15] = 2.0**-100
    with pytest.raises(ValueError, match=r"w1_scale_inv: scale of block \[.*0, 0\] is 0.0"):
        quantize_blockwise(weight.to(device), block_size=16, scale_inv=scales.to(device), name="w1")


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_stack_is_encoded_some_rows_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_ENCODED_AT_ONCE", 7 * 200)
    weight = weights((3, 40, 200), dtype)
    codes, scales = reference.quantize_blockwise(weight)
    out = torch.zeros(3, 40, 256, dtype=torch.uint8).view(FP8)
    found, _ = quantize_blockwise(weight, scale_inv=scales, out=out[..., :200])
    assert same_bits(found, codes)
    assert not out.view(torch.uint8)[..., 200:].any()


@on_each_device
def test_quantise_float64_on_given_scales(device):
    weight = weights((40, 24), F64)
    codes, scales = reference.quantize_blockwise(weight, block_size=16)
    found, _ = quantize_blockwise(weight.to(device), block_size=16, scale_inv=scales.to(device))
    assert same_bits(found, codes)


@on_each_device
def test_every_bfloat16_quantises_as_the_reference_does(device):
    """On scale 1 and on one that divides unevenly: every rounding, tie, subnormal code and saturation."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    weight = torch.where(bits.isfinite(), bits, 0).view(256, 256)
    scales = torch.tensor([[1.0, 2.0**-60 * 3], [0.7, 2.0**-126]])
    expected, _ = reference.quantize_blockwise(weight, scale_inv=scales)
    assert same_bits(quantize_blockwise(weight.to(device), scale_inv=scales.to(device))[0], expected)


@on_each_device
def test_round_trip_on_source_scales_is_byte_identical(device):
    codes, scales = (x.to(device) for x in source((300, 200)))
    again, _ = quantize_blockwise(dequantize_blockwise(codes, scales), scale_inv=scales)
    assert same_bits(again, codes.cpu())


@on_each_device
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_quantise_refuses(value, device):
    weight = weights((130, 130)).to(device)
    scales = torch.ones(2, 2, device=device)
    with pytest.raises(ValueError, match="row 3, column 0 of a block, and no scale_inv"):
        quantize_blockwise(weight, row_offset=3)
    for options in ({}, {"scale_inv": scales}):
        with pytest.raises(ValueError, match=rf"w1: value at \[129, 0\] is {value}"):
            quantize_blockwise(damage(weight, (129, 0), value), **options, name="w1")
    codes = quantize_blockwise(damage(weight, (129, 0), value), scale_inv=scales, check_values=False)[0].float()
    assert same_bits(codes[129, 0], torch.tensor(value).clamp(-448, 448))
    with pytest.raises(ValueError, match=r"w1_scale_inv: scale of block \[0, 1\]"):
        quantize_blockwise(weight, scale_inv=damage(scales, (0, 1), value), name="w1")
