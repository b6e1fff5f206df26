"""FP8 blocks against a table of e4m3 written out in Python, loops over blocks, and transformers' Fp8Dequantize."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles import BFLOAT16, FLOAT32, FLOAT64
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from reference.fp8 import FP8, dequantize_blockwise, quantize_blockwise, requantize_blockwise, scale_grid


def _value_of(code: int) -> float:
    """e4m3fn: sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinities; S.1111.111 is NaN."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, (code >> 3) & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


VALUES = np.array([_value_of(code) for code in range(256)])
FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], dtype=np.uint8)
POSITIVE = VALUES[:0x7F]  # 0 .. 448 in the order of their codes


def nearest_codes(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to the even code, saturating at +-448."""
    magnitude = np.minimum(np.abs(x.astype(np.float64)), 448.0)
    below = np.searchsorted(POSITIVE, magnitude, side="right") - 1
    above = np.minimum(below + 1, len(POSITIVE) - 1)
    down, up = magnitude - POSITIVE[below], POSITIVE[above] - magnitude
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def to_bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 by round to nearest even on the bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def looped(function, codes_or_values: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    """`function(block's elements, its scale)` block by block, for every matrix of a stack."""
    *stack, rows, cols = codes_or_values.shape
    out = None
    for index in np.ndindex(*stack):
        for r in range(0, rows, block):
            for c in range(0, cols, block):
                where = (*index, slice(r, r + block), slice(c, c + block))
                piece = function(codes_or_values[where], scales[(*index, r // block, c // block)])
                out = np.empty(codes_or_values.shape, piece.dtype) if out is None else out
                out[where] = piece
    return out


def decode(codes: np.ndarray, scale: np.float32) -> np.ndarray:
    """The product has 4 + 24 significant bits: exact in float64, then rounded to float32."""
    return (VALUES[codes] * np.float64(scale)).astype(np.float32)


def fp8(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes.copy()).view(FP8)


def codes_of(weight: torch.Tensor) -> np.ndarray:
    return weight.view(torch.uint8).numpy()


def same_bits(tensor: torch.Tensor, bits: np.ndarray) -> bool:
    """Bit for bit, so that -0.0 is not 0.0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return np.array_equal(tensor.view(integer).numpy(), bits.view(integer.__str__().removeprefix("torch.")))


@st.composite
def source_matrices(draw):
    """Any finite codes (-0.0 and subnormals among them), any scales from 2^-60 to 2^60, edge blocks, leading stacks."""
    block = draw(st.sampled_from([1, 3, 16, 128]))
    rows, cols = (draw(st.integers(1, 3 * block if block < 128 else 300)) for _ in range(2))
    shape = (*draw(st.sampled_from([(), (3,), (2, 2)])), rows, cols)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    exponents = generator.uniform(-60, 60, scale_grid(shape, block))
    return fp8(generator.choice(FINITE, shape)), torch.from_numpy(np.exp2(exponents).astype(np.float32)), block


def normal_matrix(shape, dtype=FLOAT32, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --------------------------------------------------------------------------------------------------------- dequantise


@pytest.mark.parametrize("scale", [1.0, 0.0123, 2.0**-20 / 3, 7e5])
def test_every_finite_code_decodes_exactly(scale):
    codes, scale = FINITE.reshape(2, 127), np.float32(scale)
    scale_inv = torch.full((1, 1), float(scale))
    expected = decode(codes, scale)
    assert same_bits(dequantize_blockwise(fp8(codes), scale_inv, dtype=FLOAT32), expected)
    assert same_bits(dequantize_blockwise(fp8(codes), scale_inv, dtype=FLOAT64), VALUES[codes] * np.float64(scale))
    assert same_bits(dequantize_blockwise(fp8(codes), scale_inv), to_bf16_bits(expected))


@settings(max_examples=30, deadline=None, database=None)
@given(source_matrices())
def test_dequantise_is_a_loop_over_blocks(source):
    weight, scale_inv, block = source
    expected = looped(decode, codes_of(weight), scale_inv.numpy(), block)
    assert same_bits(dequantize_blockwise(weight, scale_inv, block_size=block, dtype=FLOAT32), expected)
    assert same_bits(dequantize_blockwise(weight, scale_inv, block_size=block), to_bf16_bits(expected))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("shape", [(256, 384), (2, 128, 256)])
def test_dequantise_is_transformers(shape, dtype):
    """Its block size is rows / scale rows, so that only shapes without edge blocks can be compared."""
    generator = np.random.default_rng(0)
    weight = fp8(generator.choice(FINITE, shape))
    scale_inv = torch.from_numpy(generator.uniform(1e-4, 1e-1, scale_grid(shape)).astype(np.float32))
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale_inv, output_dtype=dtype)
    assert torch.equal(dequantize_blockwise(weight, scale_inv, dtype=dtype), theirs)


def test_the_scale_is_not_rounded_to_bfloat16_first():
    codes = FINITE.reshape(2, 127)
    scale = 1.00390625 + 2.0**-9  # between two bfloat16 numbers
    ours = dequantize_blockwise(fp8(codes), torch.full((1, 1), scale))
    early = (torch.from_numpy(VALUES[codes]) * torch.tensor(scale).to(BFLOAT16).double()).to(BFLOAT16)
    assert same_bits(ours, to_bf16_bits(decode(codes, np.float32(scale))))
    assert (ours != early).double().mean() > 0.2


# ----------------------------------------------------------------------------------------------------------- quantise


@settings(max_examples=40, deadline=None, database=None)
@given(source_matrices(), st.sampled_from([BFLOAT16, FLOAT32, FLOAT64]))
def test_round_trip_on_source_scales_is_byte_identical(source, dtype):
    weight, scale_inv, block = source
    wide = dequantize_blockwise(weight, scale_inv, block_size=block, dtype=dtype)
    for encode in (quantize_blockwise, requantize_blockwise):
        again, scales = encode(wide, block_size=block, scale_inv=scale_inv)
        assert np.array_equal(codes_of(again), codes_of(weight))
        assert torch.equal(scales, scale_inv)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32, FLOAT64])
@pytest.mark.parametrize(("shape", "block"), [((300, 200), 128), ((2, 3, 17, 9), 4), ((1, 1), 128), ((128, 256), 128)])
def test_fresh_scales_are_amax_over_448_and_codes_are_the_nearest(shape, block, dtype):
    weight = normal_matrix(shape, dtype)
    values = weight.double().numpy()
    codes, scale_inv = quantize_blockwise(weight, block_size=block)

    amax = looped(lambda x, _: np.full(x.shape, np.abs(x).max(), np.float32), values, scale_inv.numpy(), block)
    spread = looped(lambda x, s: np.full(x.shape, s), values, scale_inv.numpy(), block)
    assert scale_inv.shape == scale_grid(shape, block)
    assert np.array_equal(spread, amax / np.float32(448))

    quotient = values / spread.astype(np.float64) if dtype == FLOAT64 else values.astype(np.float32) / spread
    assert np.array_equal(codes_of(codes), nearest_codes(quotient.astype(np.float32)))
    # Half a unit in the last of e4m3's places: 2^(e-4) for |x| in [2^e, 2^(e+1)), 2^-10 below 2^-6; and the quotient
    # itself was rounded to float32.
    exact = np.abs(values / spread.astype(np.float64))
    half_unit = np.exp2(np.maximum(np.floor(np.log2(exact + 1e-300)), -6) - 4)
    error = np.abs(VALUES[codes_of(codes)] * spread - values)
    assert (error <= (half_unit + exact * 2.0**-24) * spread).all()


def test_a_block_of_zeros_gets_scale_1():
    weight = normal_matrix((130, 130))
    weight[:128, 128:] = 0
    codes, scale_inv = quantize_blockwise(weight)
    assert scale_inv[0, 1] == 1.0
    assert (scale_inv != 1.0).sum() == 3
    assert not codes_of(codes)[:128, 128:].any()


def test_values_beyond_the_given_scale_saturate():
    scale = 0.01
    weight = torch.tensor([[448.0, 449, 464.5, 1e6, -448, -449, -480, -1e30]]) * scale
    codes, _ = quantize_blockwise(weight, scale_inv=torch.full((1, 1), scale))
    assert codes_of(codes).tolist() == [[0x7E] * 4 + [0xFE] * 4]


# ---------------------------------------------------------------------------------------------------------- requantise


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize(
    "block", [(0, 0, 0), (0, 2, 1), (1, 1, 0)], ids=["inner block", "edge block", "second of the stack"]
)
def test_requantise_touches_only_the_block_that_changed(block, dtype):
    generator = np.random.default_rng(0)
    shape = (2, 300, 200)
    source = fp8(generator.choice(FINITE, shape))
    source_scales = torch.from_numpy(generator.uniform(1e-3, 1e-1, scale_grid(shape)).astype(np.float32))
    weight = dequantize_blockwise(source, source_scales, dtype=dtype)
    stack, r, c = block
    here = (stack, slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
    weight[stack, 128 * r + 5, 128 * c + 7] = -500 * float(source_scales[block])
    codes, scales = requantize_blockwise(weight, source_scales)

    assert scales[block] == np.float32(weight[here].abs().max().float().item()) / np.float32(448)
    assert scales[block] != source_scales[block]
    expected = codes_of(source).copy()
    expected[here] = nearest_codes(weight[here].float().numpy() / scales[block].numpy())
    assert np.array_equal(codes_of(codes), expected)
    elsewhere = torch.ones_like(scales, dtype=torch.bool)
    elsewhere[block] = False
    assert torch.equal(scales[elsewhere], source_scales[elsewhere])


def test_requantise_gives_a_block_that_outgrew_its_scale_a_fresh_one():
    weight = normal_matrix((64, 64), BFLOAT16)
    codes, scales = quantize_blockwise(weight)
    grown = dequantize_blockwise(codes, scales) * 3
    again, fresh = requantize_blockwise(grown, scales)
    assert fresh.item() == grown.abs().max().float().item() / np.float32(448)
    relative = (dequantize_blockwise(again, fresh, dtype=FLOAT32) - grown.float()).norm() / grown.float().norm()
    assert relative < 2.0**-4
