"""compiled.fp8 decodes as reference.fp8 does, bit for bit: every code and scale, slices, views, scales of 0; and
what it refuses.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fp8_cases import damage, on_each_device, same_bits, sliced, source

from compiled.fp8 import dequantize_blockwise
from reference import fp8 as reference
from reference.fp8 import FP8

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@on_each_device
@pytest.mark.parametrize("below", [2.0**8, 2.0**128], ids=["below 256", "whole range"])
@pytest.mark.parametrize("left_out", [0, 1], ids=["pairs of columns", "an odd number"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32, F64])
def test_every_code_on_every_kind_of_scale(dtype, left_out, below, device):
    """Subnormal scales, products that overflow, that are subnormal, and that lie between two results."""
    edges = [
        2.0**-149,
        3 * 2.0**-149,
        2.0**-126,
        2.0**-133 * 1.5,
        1.1e-40,
        1 + 2.0**-8,
        1 + 2.0**-9,
        255.99,
        256.0,
        3.4e38,
        7.6e35,
        7.5e35,
    ]
    random = torch.exp2(torch.empty(1000).uniform_(-149, 127.9, generator=torch.Generator().manual_seed(0)))
    scales = torch.cat([torch.tensor(edges), random])
    scales = scales[scales < below][None]
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, scales.numel()).view(FP8)
    codes = codes[:, : codes.shape[1] - left_out]
    finite = codes.float().isfinite()
    legal = torch.where(finite, codes.view(torch.uint8), 0).view(FP8)
    expected = reference.dequantize_blockwise(legal, scales, block_size=16, dtype=dtype)
    expected = torch.where(finite, expected, torch.nan)
    found = dequantize_blockwise(codes.to(device), scales.to(device), block_size=16, dtype=dtype, check_values=False)
    assert same_bits(found, expected)


SHAPES = st.tuples(st.sampled_from([(), (2,), (5,)]), st.integers(2, 300), st.sampled_from([2, 7, 24, 130, 200, 384]))


@on_each_device
@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(shape=SHAPES.map(lambda s: (*s[0], *s[1:])), block=st.sampled_from([3, 16, 128]), seed=st.integers(0, 2**32))
def test_dequantise_is_the_reference(shape, block, seed, device):
    codes, scales = source(shape, block, seed)
    found = dequantize_blockwise(codes.to(device), scales.to(device), block_size=block)
    assert same_bits(found, reference.dequantize_blockwise(codes, scales, block_size=block))


@on_each_device
@pytest.mark.parametrize("shape", [(1, 1), (1, 5, 3), (0, 128), (128, 0), (0, 4, 4)])
def test_smallest_shapes(shape, device):
    codes, scales = source(shape)
    found = dequantize_blockwise(codes.to(device), scales.to(device))
    assert found.shape == shape
    assert same_bits(found, reference.dequantize_blockwise(codes, scales))


def test_scales_that_nobody_checked_are_multiplied_with():
    """Also one of 256 or more and negative: the caller answers for it, and gets the product."""
    codes, _ = source((4, 4))
    for scale in (-300.0, 0.0, torch.inf):
        found = dequantize_blockwise(codes, torch.full((1, 1), scale), dtype=F32, check_values=False)
        assert same_bits(found, codes.float() * scale)


def test_other_default_devices_leave_nothing_behind():
    """What is remembered between calls is not made where the default device happened to be."""
    codes, scales = source((5, 7), block=16)
    with torch.device("meta"):
        dequantize_blockwise(codes, scales, block_size=16)
    found = dequantize_blockwise(codes, scales, block_size=16)
    assert same_bits(found, reference.dequantize_blockwise(codes, scales, block_size=16))


def test_subnormal_codes_where_the_thread_flushes_subnormal_numbers():
    """The codes below 2^-6 are read by way of subnormal float32, which such a thread takes for zero."""
    codes = torch.arange(256, dtype=torch.uint8)[None].view(FP8)
    expected = codes.float()
    assert torch.set_flush_denormal(True)
    try:
        found = dequantize_blockwise(codes, torch.ones(1, 1), block_size=256, dtype=F32, check_values=False)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(found, expected)


# -------------------------------------------------------------------------------------------------------------- slices


@on_each_device
def test_a_slice_at_any_offset_is_the_slice_of_the_whole(device):
    block, length = 16, 27  # one or two borders inside
    codes, scales = (x.to(device) for x in source((64, 64), block))
    whole = reference.dequantize_blockwise(codes.cpu(), scales.cpu(), block_size=block)
    for start in range(2 * block):
        for rows, cols in [(start, 0), (0, start), (start, 31 - start)]:
            area = slice(rows, rows + length), slice(cols, cols + length)
            assert same_bits(dequantize_blockwise(**sliced(codes, scales, *area, block)), whole[area]), (rows, cols)


@on_each_device
@pytest.mark.parametrize("stack", [(), (3,)])
def test_tensor_parallel_shards_of_192(stack, device):
    """1536 rows or columns over 8 ranks; every other shard starts in the middle of a block."""
    for shape, axis in (((1536, 256), 0), ((256, 1536), 1)):
        codes, scales = (x.to(device) for x in source((*stack, *shape)))
        whole = reference.dequantize_blockwise(codes.cpu(), scales.cpu())
        for start in range(0, 1536, 192):
            area = [slice(0, 256), slice(0, 256)]
            area[axis] = slice(start, start + 192)
            found = dequantize_blockwise(**sliced(codes, scales, *area, 128))
            assert same_bits(found, whole[..., *area])


# --------------------------------------------------------------------------------------------------------------- views


@on_each_device
@pytest.mark.parametrize(
    "view",
    [lambda p: p[1, 64:364], lambda p: p[1, :300, 8:208], lambda p: p[1, 5:305, 3:203]],
    ids=["rows", "columns", "odd start"],
)
def test_out_is_a_part_of_a_bigger_parameter(view, device):
    parameter = torch.nn.Parameter(torch.full((2, 400, 400), 7.0, dtype=BF16, device=device))
    place = view(parameter)
    codes, scales = source(tuple(place.shape))
    expected = parameter.detach().clone()
    view(expected).copy_(reference.dequantize_blockwise(codes, scales))
    assert dequantize_blockwise(codes.to(device), scales.to(device), out=place) is place
    assert same_bits(parameter.detach(), expected.cpu())
    assert parameter.grad is None


@on_each_device
@pytest.mark.parametrize(
    "view", [lambda w: w[:, 8:208], lambda w: w[3:, 5:], lambda w: w.mT], ids=["columns", "odd start", "transposed"]
)
def test_the_weight_may_be_a_view(view, device):
    """Strides and starts at which codes cannot be read eight at a time."""
    codes = view(source((304, 400))[0])
    scales = source(tuple(codes.shape))[1]
    whole = source((304, 400))[0].to(device)
    found = dequantize_blockwise(view(whole), scales.to(device))
    assert same_bits(found, reference.dequantize_blockwise(codes.contiguous(), scales))


@on_each_device
def test_experts_into_a_part_of_a_stacked_parameter(device):
    """w1 of three experts into the first half of each expert's fused [w1; w3]."""
    fused = torch.zeros(3, 2 * 136, 256, dtype=BF16, device=device)
    codes, scales = source((3, 136, 256))
    dequantize_blockwise(codes.to(device), scales.to(device), out=fused[:, :136])
    assert same_bits(fused[:, :136], reference.dequantize_blockwise(codes, scales))
    assert not fused[:, 136:].any()


@on_each_device
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("odd", ["none", "an address", "strides"])
def test_each_expert_into_a_tensor_of_its_own(odd, dtype, device):
    """As the experts' weights are parameters of their own; a slice that starts inside a block."""
    codes, scales = source((3, 136, 256))
    rows, cols, offsets = slice(100, 136), slice(64, 192), {"row_offset": 100, "col_offset": 64}
    memory = [torch.full((40, 150 + i), 7.0, dtype=dtype, device=device) for i in range(3)]
    out = [x.view(-1)[: 36 * 128].view(36, 128) for x in memory]
    if odd == "an address":
        out[1] = memory[1].view(-1)[1 : 1 + 36 * 128].view(36, 128)
    elif odd == "strides":
        out = [x[2:38, 3:131] for x in memory]
    expected = reference.dequantize_blockwise(codes, scales, dtype=dtype)[:, rows, cols]
    operands = codes[:, rows, cols].to(device), scales.to(device)
    assert dequantize_blockwise(*operands, dtype=dtype, out=out, **offsets) is out
    assert all(same_bits(one, whole) for one, whole in zip(out, expected, strict=True))
    assert sum(int((x != 7).sum()) for x in memory) == sum(int((x != 7).sum()) for x in expected), "nothing else"


# ------------------------------------------------------------------------------------------------------ what is refused


GOOD = source((2, 300, 200))
REFUSED = {
    "grid too small": ((GOOD[0], GOOD[1][:, :2]), {}, r"w1_scale_inv: .* grid of \[2, 2, 2\].*expected \[2, 3, 2\]"),
    "one matrix's grid": ((GOOD[0], GOOD[1][0]), {}, r"w1_scale_inv: .* grid of \[3, 2\].*expected \[2, 3, 2\]"),
    "whole grid": ((GOOD[0][:, :100], GOOD[1]), {"row_offset": 64}, r"grid of \[2, 3, 2\].*expected \[2, 2, 2\]"),
    "offset beyond the block": (GOOD, {"row_offset": 128}, "w1: found row_offset 128.*0 <= offset < 128"),
    "rounded scales": ((GOOD[0], GOOD[1].to(BF16)), {}, "w1_scale_inv: found torch.bfloat16"),
    "already decoded": ((GOOD[0].to(BF16), GOOD[1]), {}, "w1: found torch.bfloat16, expected torch.float8_e4m3fn"),
    "a vector": ((GOOD[0][0, 0], GOOD[1][0, 0]), {}, r"w1: found shape \[200\]"),
    "out of another shape": (GOOD, {"out": torch.empty(300, 200, dtype=BF16)}, r"w1: found out of \[300, 200\]"),
    "out for one of two": (GOOD, {"out": [torch.empty(300, 200, dtype=BF16)]}, "found 1 tensors as out.*one for each"),
    "out for experts of a matrix": ((GOOD[0][0], GOOD[1][0]), {"out": []}, "found 0 tensors as out.*one for each"),
    "out of another dtype": (GOOD, {"out": torch.empty(2, 300, 200)}, "w1: found out of .* torch.float32 .*expected"),
    "zero scale": ((GOOD[0], damage(GOOD[1], (1, 2, 0), 0.0)), {}, r"w1_scale_inv: scale of block \[1, 2, 0\] is 0.0"),
    "negative scale": ((GOOD[0], damage(GOOD[1], (1, 2, 0), -1.0)), {}, r"w1_scale_inv: .*\[1, 2, 0\] is -1.0"),
    "infinite scale": ((GOOD[0], damage(GOOD[1], (0, 0, 1), torch.inf)), {}, r"w1_scale_inv: .*\[0, 0, 1\] is inf"),
    "NaN scale": ((GOOD[0], damage(GOOD[1], (0, 2, 1), torch.nan)), {}, r"w1_scale_inv: .*\[0, 2, 1\] is nan"),
    "NaN code": ((damage(GOOD[0], (1, 9, 8), torch.nan), GOOD[1]), {}, r"w1: float8 code at \[1, 9, 8\] is NaN"),
}  # fmt: skip


@on_each_device
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, device):
    operands, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        dequantize_blockwise(*(x.to(device) for x in operands), **options, name="w1")


# --------------------------------------------------------------------------------------------- scales of 0 over zeros


def over_zeros(shape: tuple[int, ...], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, every third of which is 0 over zeros of both signs."""
    codes, scales = source(shape, block)
    zero = (torch.arange(scales.numel()) % 3 == 0).view(scales.shape)
    inside = zero.repeat_interleave(block, -2)[..., : shape[-2], :].repeat_interleave(block, -1)[..., : shape[-1]]
    bits = codes.view(torch.uint8)
    return torch.where(inside, bits & 0x80, bits).view(FP8), scales.masked_fill(zero, 0.0)


@on_each_device
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("shape", [(64, 48), (3, 40, 27), (5, 7)])
def test_a_scale_of_zero_over_zeros_is_the_references(shape, dtype, device):
    codes, scales = over_zeros(shape, 16)
    expected = reference.dequantize_blockwise(codes, scales, block_size=16, dtype=dtype)
    for check in (True, False):
        found = dequantize_blockwise(
            codes.to(device), scales.to(device), block_size=16, dtype=dtype, check_values=check
        )
        assert same_bits(found, expected)


@on_each_device
@pytest.mark.parametrize("rows", [(0, 64), (3, 40), (17, 31), (16, 17)])
@pytest.mark.parametrize("cols", [(0, 64), (5, 64), (30, 34)])
def test_a_slice_of_a_weight_with_scales_of_zero(rows, cols, device):
    """Only what is in the slice is looked at; one value under a scale of 0 in it is an error."""
    codes, scales = over_zeros((64, 64), 16)
    area = slice(*rows), slice(*cols)
    whole = reference.dequantize_blockwise(codes, scales, block_size=16)
    here = sliced(codes.to(device), scales.to(device), *area, 16)
    assert same_bits(dequantize_blockwise(**here), whole[area])
    bits = codes.view(torch.uint8)
    bits[rows[1] - 1, cols[1] - 1] = 1
    scales[(rows[1] - 1) // 16, (cols[1] - 1) // 16] = 0.0
    here = sliced(codes.to(device), scales.to(device), *area, 16)
    last = [(stop - 1) // 16 - start // 16 for start, stop in (rows, cols)]
    with pytest.raises(ValueError, match=rf"w1_scale_inv: scale of block \[{last[0]}, {last[1]}\] is 0.0"):
        dequantize_blockwise(**here, name="w1")


@on_each_device
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_either_nan_code_is_refused_and_passes_where_the_caller_says_so(code, device):
    codes, scales = source((130, 130))
    codes.view(torch.uint8)[129, 64] = code
    with pytest.raises(ValueError, match=r"at \[129, 64\] is NaN \(1 of 16900\)"):
        dequantize_blockwise(codes.to(device), scales.to(device))
    assert dequantize_blockwise(codes.to(device), scales.to(device), check_values=False).isnan().sum() == 1
