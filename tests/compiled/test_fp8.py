"""compiled.fp8 equals reference.fp8 bit for bit on every code, scale, shape, slice and view; what it refuses; how often
it compiles.

The GPU half of each test needs an NVIDIA GPU of compute capability 8.9 and is skipped without one. There the kernels'
arithmetic is compared; their geometry is also checked here, under Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiled.fp8 import dequantize_blockwise, quantize_blockwise
from reference import fp8 as reference
from reference.fp8 import FP8, scale_grid

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
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


def weights(shape: tuple[int, ...], dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """Normal values, each row on its own power of two, so that codes of all sizes occur."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp2(torch.randint(-12, 12, (*shape[:-1], 1), generator=generator))
    return (torch.randn(shape, generator=generator) * rows).to(dtype)


# --------------------------------------------------------------------------------------------------------- dequantise


@on_each_device
@pytest.mark.parametrize("below", [2.0**8, 2.0**128], ids=["below 256", "whole range"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32, F64])
def test_every_code_on_every_kind_of_scale(dtype, below, device):
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


def sliced(codes: Tensor, scales: Tensor, rows: slice, cols: slice, block: int) -> dict:
    """The arguments for a slice of a weight, as the module's docstring says."""
    grid = [slice(s.start // block, -(-s.stop // block)) for s in (rows, cols)]
    offsets = {"row_offset": rows.start % block, "col_offset": cols.start % block}
    return {"weight": codes[..., rows, cols], "scale_inv": scales[..., *grid], "block_size": block, **offsets}


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
@pytest.mark.parametrize("odd", [[], [1], [0, 1, 2]], ids=["alike", "one at an odd address", "all of other strides"])
def test_each_expert_into_a_tensor_of_its_own(odd, dtype, device):
    """As the experts' weights are parameters of their own; a slice that starts inside a block."""
    codes, scales = source((3, 136, 256))
    rows, cols, offsets = slice(100, 136), slice(64, 192), {"row_offset": 100, "col_offset": 64}
    memory = [torch.full((40, 150 + i), 7.0, dtype=dtype, device=device) for i in range(3)]
    out = [x[2:38, 3:131] if i in odd else x.view(-1)[: 36 * 128].view(36, 128) for i, x in enumerate(memory)]
    expected = reference.dequantize_blockwise(codes, scales, dtype=dtype)[:, rows, cols]
    operands = codes[:, rows, cols].to(device), scales.to(device)
    assert dequantize_blockwise(*operands, dtype=dtype, out=out, **offsets) is out
    assert all(same_bits(one, whole) for one, whole in zip(out, expected, strict=True))
    assert sum(int((x != 7).sum()) for x in memory) == sum(int((x != 7).sum()) for x in expected), "nothing else"


# ----------------------------------------------------------------------------------------------------------- quantise


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


# -------------------------------------------------------------------------------------------------------------- errors


def _damage(tensor: Tensor, where: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[where] = value
    return tensor


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
    "zero scale": ((GOOD[0], _damage(GOOD[1], (1, 2, 0), 0.0)), {}, r"w1_scale_inv: scale of block \[1, 2, 0\] is 0.0"),
    "negative scale": ((GOOD[0], _damage(GOOD[1], (1, 2, 0), -1.0)), {}, r"w1_scale_inv: .*\[1, 2, 0\] is -1.0"),
    "infinite scale": ((GOOD[0], _damage(GOOD[1], (0, 0, 1), torch.inf)), {}, r"w1_scale_inv: .*\[0, 0, 1\] is inf"),
    "NaN scale": ((GOOD[0], _damage(GOOD[1], (0, 2, 1), torch.nan)), {}, r"w1_scale_inv: .*\[0, 2, 1\] is nan"),
    "NaN code": ((_damage(GOOD[0], (1, 9, 8), torch.nan), GOOD[1]), {}, r"w1: float8 code at \[1, 9, 8\] is NaN"),
}  # fmt: skip


@on_each_device
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, device):
    operands, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        dequantize_blockwise(*(x.to(device) for x in operands), **options, name="w1")


@on_each_device
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_either_nan_code_is_refused_and_passes_where_the_caller_says_so(code, device):
    codes, scales = source((130, 130))
    codes.view(torch.uint8)[129, 64] = code
    with pytest.raises(ValueError, match=r"at \[129, 64\] is NaN \(1 of 16900\)"):
        dequantize_blockwise(codes.to(device), scales.to(device))
    assert dequantize_blockwise(codes.to(device), scales.to(device), check_values=False).isnan().sum() == 1


@on_each_device
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_quantise_refuses(value, device):
    weight = weights((130, 130)).to(device)
    scales = torch.ones(2, 2, device=device)
    with pytest.raises(ValueError, match="row 3, column 0 of a block, and no scale_inv"):
        quantize_blockwise(weight, row_offset=3)
    for options in ({}, {"scale_inv": scales}):
        with pytest.raises(ValueError, match=rf"w1: value at \[129, 0\] is {value}"):
            quantize_blockwise(_damage(weight, (129, 0), value), **options, name="w1")
    codes = quantize_blockwise(_damage(weight, (129, 0), value), scale_inv=scales, check_values=False)[0].float()
    assert same_bits(codes[129, 0], torch.tensor(value).clamp(-448, 448))
    with pytest.raises(ValueError, match=r"w1_scale_inv: scale of block \[0, 1\]"):
        quantize_blockwise(weight, scale_inv=_damage(scales, (0, 1), value), name="w1")


# -------------------------------------------------------------------------------------------------------- compilations


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_twenty_shapes_cost_one_compilation():
    torch._dynamo.reset()
    before = compilations()
    for n in range(10):
        dequantize_blockwise(*source((30 + 37 * n, 61 * (n % 5 + 2))))
        dequantize_blockwise(*source((2 + n, 40 * n + 30, 384)))
    assert compilations() - before == 1


def test_more_kinds_of_tensors_than_torch_compiles_by_default():
    torch._dynamo.reset()
    codes, scales = source((130, 256))
    with torch._dynamo.config.patch(recompile_limit=1):
        for weight in (codes, codes.mT.contiguous().mT):
            assert same_bits(dequantize_blockwise(weight, scales), reference.dequantize_blockwise(codes, scales))


def in_a_fresh_interpreter(program: str, **environment: str) -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), **environment}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_compiles_nothing():
    in_a_fresh_interpreter(
        "import sys, compiled.fp8\n"
        "assert not {'torch._dynamo.eval_frame', 'torch._inductor.compile_fx', 'triton'} & set(sys.modules)"
    )


INTERPRETED = """
import torch
from compiled import fp8_kernels as kernels
from reference.fp8 import dequantize_blockwise, quantize_blockwise
torch.manual_seed(0)
for block, start, shape in ((128, (150, 70), (2, 300, 200)), (3, (4, 2), (1, 7, 10))):
    codes, scales = quantize_blockwise(torch.randn(shape), block_size=block)
    whole = dequantize_blockwise(codes, scales, block_size=block, dtype=torch.float32)
    for row, col in ((0, 0), start):
        part = codes[:, row:, col:]
        out, damaged = torch.full((*part.shape, 2), 7.0)[..., 0], torch.zeros(1, dtype=torch.int32)
        operands = part, scales[:, row // block :, col // block :], out, damaged, block, row % block, col % block
        kernels.launch(kernels.dequantize, *operands, torch.float32)
        assert torch.equal(out, whole[:, row:, col:]) and not damaged
        each = [torch.empty(part.shape[1:]) for _ in part]
        kernels.launch(kernels.dequantize, part, operands[1], each, *operands[3:], torch.float32)
        assert torch.equal(torch.stack(each), whole[:, row:, col:]) and not damaged
scales[0, -1, -1] = torch.inf
kernels.launch(kernels.dequantize, codes, scales, torch.empty(codes.shape), damaged, block, 0, 0, torch.float32)
assert damaged
"""


@pytest.mark.slow  # the kernels themselves are tested on a GPU
def test_geometry_of_the_cuda_kernels():
    """Triton's interpreter runs them on the CPU; its bfloat16 and its NaN are not the hardware's, so float32 it is."""
    pytest.importorskip("triton")
    in_a_fresh_interpreter(INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.gpu
@NO_GPU
def test_twenty_shapes_on_the_gpu():
    from compiled import fp8_kernels

    def kernels() -> int:
        return sum(len(cache[0]) for cache in fp8_kernels.dequantize.kernel.device_caches.values())

    before = kernels()
    for rows, cols in [(2 + 37 * n, 16 * (n % 7 + 2)) for n in range(20)]:
        dequantize_blockwise(*(x.cuda() for x in source((rows, cols))))
    assert kernels() - before <= 4
