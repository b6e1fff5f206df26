"""Rotary embedding against transformers' MiniMaxM2RotaryEmbedding and apply_rotary_pos_emb."""

import pytest
import torch
from support.checks import assert_calibrated, assert_relative
from support.oracles import BFLOAT16, CASES, FLOAT32, FLOAT64, remove_float32_casts
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding, apply_rotary_pos_emb

from reference.rope import apply_rotary, inverse_frequencies, rotary_tables

# head_dim, rotary_dim, theta: a quarter, half and all of the channels, both head sizes; the second is the released one.
WIDTHS = [(64, 16, 5e6), (128, 64, 5e6), (128, 128, 5e6), (64, 64, 1e4), (128, 32, 1e6)]
POSITIONS = torch.tensor([0, 1, 2, 3, 7, 100, 4095, 32768, 196607])


def hf_tables(head_dim, rotary_dim, theta, dtype, positions=POSITIONS):
    """transformers' cos and sin, [1, seq, rotary_dim]: each half repeated."""
    config = CASES["2to1_half_hd128_top7"].hf_config()
    config.head_dim = head_dim
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": theta,
        "partial_rotary_factor": rotary_dim / head_dim,
    }
    rotary = MiniMaxM2RotaryEmbedding(config)
    assert rotary.inv_freq.shape == (rotary_dim // 2,)
    return rotary.inv_freq, *rotary(torch.empty(0, dtype=dtype), positions[None])


def draw(head_dim, dtype, seed=0):
    """x, dL/dy: [seq, batch, heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, len(POSITIONS), 2, 3, head_dim, generator=generator, dtype=FLOAT64).to(dtype)


def rotate_with_gradient(function, x, g):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


def hf_apply(x, cos, sin):
    """transformers on [batch, heads, seq, head_dim]."""
    query = x.permute(1, 2, 0, 3)
    rotated, also_rotated = apply_rotary_pos_emb(query, query, cos, sin)
    assert torch.equal(rotated, also_rotated)
    return rotated.permute(2, 0, 1, 3)


@pytest.mark.parametrize(("head_dim", "rotary_dim", "theta"), WIDTHS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_tables_are_transformers_bit_for_bit(head_dim, rotary_dim, theta, dtype):
    inv_freq, cos, sin = hf_tables(head_dim, rotary_dim, theta, dtype)
    assert torch.equal(inverse_frequencies(rotary_dim, theta), inv_freq)
    ours_cos, ours_sin = rotary_tables(POSITIONS, rotary_dim, theta, dtype=dtype)
    assert ours_cos.dtype == ours_sin.dtype == dtype
    assert torch.equal(ours_cos.repeat(1, 2), cos[0])
    assert torch.equal(ours_sin.repeat(1, 2), sin[0])


@pytest.mark.parametrize(("head_dim", "rotary_dim", "theta"), WIDTHS)
def test_float64_tables(head_dim, rotary_dim, theta, monkeypatch):
    """An angle of p radians carries p x 2^-52 of rounding, whatever computes it; the largest is 196607: 4.4e-11."""
    remove_float32_casts(monkeypatch)
    _, cos, sin = hf_tables(head_dim, rotary_dim, theta, FLOAT64)
    for ours, theirs in zip(rotary_tables(POSITIONS, rotary_dim, theta, dtype=FLOAT64), (cos, sin), strict=True):
        assert ours.dtype == FLOAT64
        bound = 2 * (POSITIONS + 1)[:, None] * 2.0**-52
        assert ((ours.repeat(1, 2) - theirs[0]).abs() <= bound).all()


@pytest.mark.parametrize(("head_dim", "rotary_dim", "theta"), WIDTHS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, BFLOAT16])
def test_rotation_values_and_gradient(head_dim, rotary_dim, theta, dtype):
    """Bit for bit from float32 up, where the operations are the same; below, transformers rounds each product."""
    x, g = draw(head_dim, dtype)
    _, *tables = hf_tables(head_dim, rotary_dim, theta, dtype)
    halves = [table[0, :, : rotary_dim // 2] for table in tables]
    ours = rotate_with_gradient(lambda x: apply_rotary(x, *halves), x, g)
    theirs = rotate_with_gradient(lambda x: hf_apply(x, *tables), x, g)
    if dtype != BFLOAT16:
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        return
    wide = [table.double() for table in tables]
    truth = rotate_with_gradient(lambda x: hf_apply(x, *wide), x.double(), g.double())
    for name, a, b, t in zip(("y", "dx"), ours, theirs, truth, strict=True):
        assert a.dtype == BFLOAT16
        # Ours rounds once: half a unit in the last of 8 places, and two float32 products and their sum.
        assert ((a.double() - t).abs() <= t.abs() * 2.0**-8 + 3 * 2.0**-24 * t.abs().max()).all()
        assert_calibrated(a, b, t, name)


@pytest.mark.parametrize(("head_dim", "rotary_dim", "theta"), WIDTHS)
def test_only_the_first_channels_turn_and_only_differences_of_position_matter(head_dim, rotary_dim, theta):
    query, key = draw(head_dim, FLOAT64)
    shift = 13

    def scores(offset):
        tables = rotary_tables(POSITIONS[:6] + offset, rotary_dim, theta, dtype=FLOAT64)
        turned = [apply_rotary(x[:6], *tables) for x in (query, key)]
        for x, y in zip((query, key), turned, strict=True):
            assert torch.equal(y[..., rotary_dim:], x[:6, ..., rotary_dim:])
            assert not torch.isclose(y[1:, ..., :rotary_dim], x[1:6, ..., :rotary_dim]).all(-1).any()
        return torch.einsum("sbhd,tbhd->bhst", *turned)

    # Angles up to 113 radians are off by 113 x 2^-52 = 3e-14, a score by a few times that of |q||k|; the largest score
    # is a tenth of |q||k| or more.
    assert_relative(scores(shift), scores(0), 1e-11)
