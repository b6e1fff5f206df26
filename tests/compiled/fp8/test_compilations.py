"""How often compiled.fp8 compiles, and what its import loads; its CUDA kernels' geometry under Triton's interpreter.

Their arithmetic is compared on a GPU, by the tests that run on each device.
"""

import pytest
import torch
from support.checks import NO_GPU, succeeds_in_a_fresh_interpreter, succeeds_in_triton_s_interpreter
from support.fp8_cases import same_bits, source

from compiled.fp8 import dequantize_blockwise
from reference import fp8 as reference


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_twenty_shapes_cost_two_compilations():
    """One for an even number of columns, which are decoded in pairs, one for an odd number."""
    torch._dynamo.reset()
    before = compilations()
    for n in range(10):
        dequantize_blockwise(*source((30 + 37 * n, 61 * (n % 5 + 2))))
        dequantize_blockwise(*source((2 + n, 40 * n + 30, 384)))
    assert compilations() - before == 2


def test_more_kinds_of_tensors_than_torch_compiles_by_default():
    torch._dynamo.reset()
    codes, scales = source((130, 256))
    with torch._dynamo.config.patch(recompile_limit=1):
        for weight in (codes, codes.mT.contiguous().mT):
            assert same_bits(dequantize_blockwise(weight, scales), reference.dequantize_blockwise(codes, scales))


def test_importing_compiles_nothing():
    succeeds_in_a_fresh_interpreter(
        "import sys, compiled.fp8\n"
        "assert not {'torch._dynamo.eval_frame', 'torch._inductor.compile_fx', 'triton'} & set(sys.modules)"
    )


INTERPRETED = """
import torch
from compiled.fp8 import kernels
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
    weight = torch.randn(shape) * torch.exp2(torch.randint(-80, 80, (*shape[:2], 1)))
    weight[0, 0, 0], weight[:, -block:, -block:] = 448.0, 0
    for scale_fmt in ("float", "ue8m0"):
        wanted, scales = quantize_blockwise(weight, block_size=block, scale_fmt=scale_fmt)
        found, out = torch.zeros_like(scales), torch.zeros(shape, dtype=torch.uint8).view(wanted.dtype)
        operands = weight, found, out, damaged, block, 0, 0, torch.float32
        kernels.launch(kernels.quantize_afresh, *operands, powers_of_two=scale_fmt == "ue8m0")
        assert torch.equal(found, scales) and not damaged
scales[0, -1, -1] = torch.inf
kernels.launch(kernels.dequantize, codes, scales, torch.empty(codes.shape), damaged, block, 0, 0, torch.float32)
assert damaged
"""


@pytest.mark.slow  # the kernels themselves are tested on a GPU
def test_geometry_of_the_cuda_kernels():
    """Triton's interpreter runs them on the CPU; its bfloat16 and its NaN are not the hardware's, so float32 it is."""
    succeeds_in_triton_s_interpreter(INTERPRETED)


@pytest.mark.gpu
@NO_GPU
def test_twenty_shapes_on_the_gpu():
    from compiled.fp8 import kernels

    def compiled_kernels() -> int:
        return sum(len(cache[0]) for cache in kernels.dequantize.kernel.device_caches.values())

    before = compiled_kernels()
    for rows, cols in [(2 + 37 * n, 16 * (n % 7 + 2)) for n in range(20)]:
        dequantize_blockwise(*(x.cuda() for x in source((rows, cols))))
    assert compiled_kernels() - before <= 4
