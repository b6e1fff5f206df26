"""compiled.fp8.requantize equals reference.fp8.requantize_blockwise bit for bit, whatever part of a weight changed."""

import pytest
import torch
from support.fp8_cases import on_each_device
from torch import Tensor

from compiled.fp8 import requantize_blockwise
from reference import fp8 as reference

BF16, F32 = torch.bfloat16, torch.float32
BLOCK = 16
SHAPES = {
    "whole blocks": (3 * BLOCK, 2 * BLOCK),
    "edge blocks": (2 * BLOCK + 5, BLOCK + 3),
    "less than a block": (7, 11),
    "stack": (3, BLOCK + 1, 2 * BLOCK + 7),
}


def source(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the weight they decode to; scales are not the ones that amax / 448 would give."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-6, 4, shape, generator=generator))
    grid = reference.scale_grid(shape, BLOCK)
    _, fitting = reference.quantize_blockwise(values, block_size=BLOCK)
    scales = fitting * (1 + torch.rand(grid, generator=generator))
    codes, _ = reference.quantize_blockwise(values, block_size=BLOCK, scale_inv=scales)
    return codes, scales, reference.dequantize_blockwise(codes, scales, block_size=BLOCK, dtype=dtype)


def one_value(weight: Tensor) -> None:
    weight[..., 0, 0] += 1


def last_value(weight: Tensor) -> None:
    """In the lower right block, which may be the smallest."""
    weight[..., -1, -1] = 3.3 * weight.abs().max()


def last_rows(weight: Tensor) -> None:
    weight[..., -1:, :] *= 1.37


def last_matrix(weight: Tensor) -> None:
    """Of a stack; of a single matrix its last row."""
    weight[-1] *= 0.77


def beyond_the_scale(weight: Tensor) -> None:
    """On its old scale the value saturates."""
    weight[..., 0, 0] = 1000 * weight.abs().max()


def zeroed_block(weight: Tensor) -> None:
    """Zero decodes to zero on any scale: the block counts as untouched and keeps its scale."""
    weight[..., :BLOCK, :BLOCK] = 0


def negative_zero(weight: Tensor) -> None:
    weight[..., 0, 0] = -0.0


def everything(weight: Tensor) -> None:
    weight *= 1.01
    weight += 1e-3


def nothing(weight: Tensor) -> None:
    pass


CHANGES = (
    nothing,
    one_value,
    last_value,
    last_rows,
    last_matrix,
    beyond_the_scale,
    zeroed_block,
    negative_zero,
    everything,
)


def assert_the_reference(
    weight: Tensor, scales: Tensor, *, block_size: int = BLOCK, scale_fmt: str = "float", device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    options = {"block_size": block_size, "scale_fmt": scale_fmt}
    codes, found = requantize_blockwise(weight.to(device), scales.to(device), **options)
    wanted_codes, wanted = reference.requantize_blockwise(weight, scales, **options)
    assert (codes.dtype, codes.shape) == (wanted_codes.dtype, wanted_codes.shape)
    assert codes.is_contiguous()
    assert torch.equal(codes.cpu().view(torch.uint8), wanted_codes.view(torch.uint8))
    assert torch.equal(found.cpu(), wanted)
    return codes.cpu(), found.cpu()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_every_change_gives_the_references_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    met = set()
    for change in CHANGES:
        codes, scales, weight = source(shape, dtype)
        change(weight)
        _, found = assert_the_reference(weight, scales)
        met.add("none" if torch.equal(found, scales) else "all" if (found != scales).all() else "some")
        if change is nothing:
            again, kept = requantize_blockwise(weight, scales, block_size=BLOCK)
            assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8)), "the source's own bytes"
            assert torch.equal(kept, scales)
    assert met == ({"none", "all", "some"} if scales.numel() > 1 else {"none", "all"}), "each path was taken"


def test_only_the_changed_block_is_touched() -> None:
    """By hand: block (1, 0) of 3 x 2, and its neighbours keep code and scale."""
    codes, scales, weight = source((3 * BLOCK, 2 * BLOCK), BF16)
    weight[BLOCK + 3, 5] *= 1.5078125
    found, found_scales = requantize_blockwise(weight, scales, block_size=BLOCK)
    assert (found_scales != scales).tolist() == [[False, False], [True, False], [False, False]]
    block = weight[BLOCK : 2 * BLOCK, :BLOCK].float()
    assert found_scales[1, 0] == block.abs().max() / 448
    untouched = torch.ones(3 * BLOCK, 2 * BLOCK, dtype=torch.bool)
    untouched[BLOCK : 2 * BLOCK, :BLOCK] = False
    assert torch.equal(found.view(torch.uint8)[untouched], codes.view(torch.uint8)[untouched])
    assert torch.equal(found[BLOCK : 2 * BLOCK, :BLOCK].float(), (block / found_scales[1, 0]).to(reference.FP8).float())


def test_a_stack_whose_matrices_share_memory() -> None:
    _, scales, weight = source((2 * BLOCK + 6, 2 * BLOCK + 6), BF16)
    weight[0, 0] += 1
    assert_the_reference(weight.expand(2, -1, -1), scales.expand(2, -1, -1))


@on_each_device
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_scales_of_zero(scale_fmt: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    """Kept over zeros of either sign, replaced over anything else."""
    codes, scales, weight = source(shape, dtype)
    weight[..., :BLOCK, :BLOCK] = 0.0
    weight[..., 1, :BLOCK] = -0.0
    scales = scales.clone()
    scales[..., 0, 0] = 0.0
    codes, found = assert_the_reference(weight, scales, scale_fmt=scale_fmt, device=device)
    assert torch.equal(found, scales)
    assert codes.view(torch.uint8)[..., 1, 0].unique().tolist() == [0x80]
    weight[..., 0, 0] = 3.0
    _, found = assert_the_reference(weight, scales, scale_fmt=scale_fmt, device=device)
    assert (found[..., 0, 0] == (2.0**-7 if scale_fmt == "ue8m0" else torch.tensor(3.0) / 448)).all()


@on_each_device
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_blocks_that_changed_get_powers_of_two(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    for change in CHANGES:
        _, scales, weight = source(shape, dtype)
        change(weight)
        _, found = assert_the_reference(weight, scales, scale_fmt="ue8m0", device=device)
        assert (torch.frexp(found[found != scales]).mantissa == 0.5).all()


@on_each_device
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_float32_weight_that_was_bfloat16(change, shape: tuple[int, ...], device: str) -> None:
    """Untouched, or touched in some blocks; the first block is the source's in float32, where there are several."""
    codes, scales, weight = source(shape, BF16)
    exact = reference.dequantize_blockwise(codes, scales, block_size=BLOCK, dtype=F32)
    weight = weight.float()
    if scales.numel() > 1:
        weight[..., :BLOCK, :BLOCK] = exact[..., :BLOCK, :BLOCK]
    change(weight)
    found_codes, found = assert_the_reference(weight, scales, device=device)
    if change is nothing:
        assert torch.equal(found, scales)
        assert torch.equal(found_codes.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4)])
def test_nothing_at_all(shape: tuple[int, ...]) -> None:
    scales = torch.ones(reference.scale_grid(shape, BLOCK))
    assert_the_reference(torch.empty(shape, dtype=BF16), scales)


def test_the_real_block_size() -> None:
    codes, scales = (torch.full((300, 260), 0.5).to(reference.FP8), torch.full((3, 3), 0.125))
    weight = reference.dequantize_blockwise(codes, scales)
    weight[299, 259] = 1.0
    assert_the_reference(weight, scales, block_size=128)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    _, scales, weight = source((BLOCK, BLOCK), BF16)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match=rf"w2: value at \[2, 3\] is {bad}"):
        requantize_blockwise(weight, scales, block_size=BLOCK, name="w2")


def test_scales_of_another_weight_are_refused() -> None:
    _, scales, weight = source((BLOCK, BLOCK), BF16)
    with pytest.raises(ValueError, match=r"w2_scale_inv: found a grid of \[1, 2\]"):
        requantize_blockwise(weight, scales.repeat(1, 2), block_size=BLOCK, name="w2")
    for bad in (-0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"w2_scale_inv: scale of block \[0, 0\] is {bad}"):
            requantize_blockwise(weight, torch.full_like(scales, bad), block_size=BLOCK, name="w2")
