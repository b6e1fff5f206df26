"""What the FP8 functions refuse, by the tensor's name: the peers read such checkpoints without a word."""

import re

import pytest
import torch
from jaxtyping import TypeCheckError
from support.checks import without_type_checks
from support.oracles import BFLOAT16, FLOAT32

from reference import fp8
from reference.fp8 import (
    FP8,
    check_scale_grid,
    dequantize_blockwise,
    float32_scales,
    quantize_blockwise,
)

NAME = "model.layers.3.self_attn.q_proj.weight"
SHAPE = (300, 200)  # in blocks of 128: a grid of 3 x 2
FUNCTIONS = {
    "dequantize": lambda weight, scale, law=fp8: law.dequantize_blockwise(weight.to(FP8), scale, name=NAME),
    "quantize": lambda weight, scale, law=fp8: law.quantize_blockwise(weight, scale_inv=scale, name=NAME),
    "requantize": lambda weight, scale, law=fp8: law.requantize_blockwise(weight, scale, name=NAME),
}
# weight, scales given, scales expected
WRONG_GRIDS = [
    ((300, 200), (2, 2), (3, 2)),
    ((300, 200), (3, 1), (3, 2)),
    ((300, 200), (2, 3), (3, 2)),
    ((300, 200), (4, 2), (3, 2)),
    ((300, 200), (1, 1), (3, 2)),
    ((300, 200), (3, 2, 1), (3, 2)),
    ((2, 300, 200), (3, 2), (2, 3, 2)),
    ((2, 300, 200), (1, 3, 2), (2, 3, 2)),
    ((128, 128), (0, 1), (1, 1)),
]


def grid_message(weight, found, expected) -> str:
    return re.escape(
        f"{NAME}_scale_inv: found a grid of {list(found)} scales, expected {list(expected)} for a weight of"
    )


@pytest.mark.parametrize(("weight", "found", "expected"), WRONG_GRIDS)
def test_check_scale_grid(weight, found, expected):
    with pytest.raises(ValueError, match=grid_message(weight, found, expected)):
        check_scale_grid(weight, found, name=NAME)
    check_scale_grid(weight, expected, name=NAME)


def test_block_size_decides_the_grid():
    check_scale_grid((300, 200), (5, 4), block_size=64)
    with pytest.raises(ValueError, match=re.escape("found a grid of [3, 2] scales, expected [5, 4]")):
        check_scale_grid((300, 200), (3, 2), block_size=64)
    with pytest.raises(ValueError, match=re.escape(f"{NAME}: block scales need a matrix, found shape [128]")):
        check_scale_grid((128,), (1,), name=NAME)


@pytest.mark.parametrize(("weight", "found", "expected"), WRONG_GRIDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_grids_are_type_errors_under_the_hook(function, weight, found, expected):
    with pytest.raises(TypeCheckError):
        FUNCTIONS[function](torch.zeros(weight), torch.ones(found))


@pytest.mark.parametrize(("weight", "found", "expected"), WRONG_GRIDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_grids_are_value_errors_without_the_hook(function, weight, found, expected):
    """Users run without the hook: there the functions themselves must refuse, and by name."""
    with pytest.raises(ValueError, match=grid_message(weight, found, expected)):
        FUNCTIONS[function](torch.zeros(weight), torch.ones(found), without_type_checks("reference.fp8"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-0.0", "-0.5"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_scale_that_is_not_finite_and_positive(function, value):
    scale = torch.full((3, 2), 0.1)
    scale[1, 1] = float(value)
    message = f"{NAME}_scale_inv: scale of block [1, 1] is {value}, expected a finite positive number (1 bad of 6)"
    with pytest.raises(ValueError, match=re.escape(message)):
        FUNCTIONS[function](torch.zeros(SHAPE), scale)


@pytest.mark.parametrize("where", [(200, 130), (128, 128), (255, 199)])
@pytest.mark.parametrize("value", [2.0**-9, -448.0])  # the least code and the greatest
@pytest.mark.parametrize("function", ["dequantize", "quantize"])
def test_a_scale_of_zero_over_a_value(function, value, where):
    weight, scale = torch.zeros(SHAPE), torch.full((3, 2), 0.1)
    weight[where], scale[1, 1] = value, 0.0
    scale[2, 0] = 0.0  # over zeros
    message = f"{NAME}_scale_inv: scale of block [1, 1] is 0.0, expected a finite positive number (1 bad of 6), or 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        FUNCTIONS[function](weight, scale)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_scale_of_zero_over_nan(code):
    weight = torch.zeros(SHAPE, dtype=torch.uint8)
    weight[299, 130] = code
    with pytest.raises(ValueError, match=re.escape(f"{NAME}_scale_inv: scale of block [2, 1] is 0.0")):
        dequantize_blockwise(weight.view(FP8), torch.zeros(3, 2), name=NAME)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_of_a_dtype_that_is_not_known(dtype):
    """Integers are bits of something, and float64 need not be exact in float32."""
    with pytest.raises(ValueError, match=rf"{NAME}_scale_inv: found {dtype}, expected one of torch.float32, .*float32"):
        float32_scales(torch.ones(3, 2).to(dtype), name=NAME)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code(code):
    weight = torch.zeros(SHAPE, dtype=torch.uint8)
    weight[299, 130] = weight[299, 131] = code
    message = f"{NAME}: float8 code at [299, 130] is NaN (2 of 60000), expected finite values"
    with pytest.raises(ValueError, match=re.escape(message)):
        dequantize_blockwise(weight.view(FP8), torch.ones(3, 2), name=NAME)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("function", ["fresh scales", "quantize", "requantize"])
def test_a_weight_that_is_not_finite(function, value, dtype):
    weight = torch.zeros(SHAPE, dtype=dtype)
    weight[7, 150] = value
    call = FUNCTIONS | {"fresh scales": lambda weight, _: quantize_blockwise(weight, name=NAME)}
    with pytest.raises(ValueError, match=re.escape(f"{NAME}: value at [7, 150] is {value}, expected finite values")):
        call[function](weight, torch.ones(3, 2))
