"""Attention against transformers' eager_attention_forward and MiniMaxM2Attention, values and gradients."""

from types import SimpleNamespace

import pytest
import torch
from support.checks import assert_calibrated, assert_relative
from support.oracles import BFLOAT16, CASES, FLOAT32, FLOAT64, disk_weights, hf_model, remove_float32_casts
from transformers.models.minimax_m2 import modeling_minimax_m2 as hf

from reference.attention import attention_block, causal_attention, linear

# seq, batch, heads, key/value heads, head_dim
SHAPES = [(7, 2, 4, 4, 64), (16, 1, 12, 2, 128), (5, 3, 5, 1, 64), (33, 2, 6, 1, 128), (1, 2, 3, 3, 64)]
BLOCK_CASES = ["6to1_half_hd128_top8", "1to1_quarter_hd64_top1", "one_group_full_hd64_top3"]
# Longest sum: head_dim or hidden size, at most 1536 terms: 1536 x 2^-53 = 2e-13, a few of them in a row.
FLOAT64_BOUND = 1e-12


def with_gradients(function, inputs, grad_output):
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_output.to(y.dtype))


def causal_mask(seq, dtype):
    """transformers' additive mask: 0 up to the query's own position, the dtype's lowest value after it."""
    return torch.full((seq, seq), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]


def hf_attention(query, key, value):
    module = SimpleNamespace(num_key_value_groups=query.shape[2] // key.shape[2], training=False)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    mask = causal_mask(query.shape[0], query.dtype)
    out, _ = hf.eager_attention_forward(module, q, k, v, mask, scaling=query.shape[-1] ** -0.5)
    return out.transpose(0, 1)


def draw(shape, dtype):
    seq, batch, heads, groups, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [heads, groups, groups, heads]
    *inputs, g = (
        torch.randn(seq, batch, n, head_dim, generator=generator, dtype=FLOAT64).to(dtype) * 1.5 for n in sizes
    )
    return inputs, g


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_attention_float64(shape, monkeypatch):
    remove_float32_casts(monkeypatch)
    inputs, g = draw(shape, FLOAT64)
    ours, theirs = (with_gradients(f, inputs, g) for f in (causal_attention, hf_attention))
    for name, a, t in zip(("y", "dq", "dk", "dv"), ours, theirs, strict=True):
        if shape[0] == 1 and name in ("dq", "dk"):  # one position: probability 1 whatever the score
            assert not a.any()
        assert_relative(a, t, FLOAT64_BOUND, name)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_causal_attention_calibrated(shape, dtype, monkeypatch):
    inputs, g = draw(shape, dtype)
    ours, theirs = (with_gradients(f, inputs, g) for f in (causal_attention, hf_attention))
    remove_float32_casts(monkeypatch)
    truth = with_gradients(hf_attention, [x.double() for x in inputs], g.double())
    for name, a, b, t in zip(("y", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
        assert a.dtype == dtype
        assert_calibrated(a, b, t, name)


@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_attention_rounds_only_its_result(shape):
    """Scores, probabilities and sums stay float32 (transformers rounds each): off by one rounding to 8 places.

    Below that, a float32 score is off by at most head_dim x 2^-24 x |q||k|/sqrt(head_dim), which moves a probability by
    twice that part of itself, and their sum over values has seq roundings more.
    """
    inputs, _ = draw(shape, BFLOAT16)
    wide = [x.double() for x in inputs]
    truth = causal_attention(*wide)
    query, key = (x.norm(dim=-1).max() for x in wide[:2])
    slack = 2.0**-24 * (2 * shape[-1] ** 0.5 * query * key + shape[0]) * wide[2].abs().max()
    assert ((causal_attention(*inputs).double() - truth).abs() <= truth.abs() * 2.0**-8 + slack).all()


def test_no_position_sees_a_later_one():
    (query, key, value), _ = draw(SHAPES[0], FLOAT32)
    before = causal_attention(query, key, value)
    for later in (key, value):
        later[4:] += 1
    after = causal_attention(query, key, value)
    assert torch.equal(before[:4], after[:4])
    assert not torch.isclose(before[4:], after[4:]).all(-1).any()


def run_block(case, weights, positions, hidden, dtype):
    """Output and the gradients of the hidden state and of each weight, by us and by transformers."""
    names = [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    values = [weights[f"model.layers.1.self_attn.{name}"] for name in names]
    model = hf_model(case, weights, dtype)
    module = model.model.layers[1].self_attn

    def ours(hidden, *values):
        return attention_block(hidden, dict(zip(names, values, strict=True)), case.model_config(), positions=positions)

    def theirs(hidden, *values):
        hidden = hidden.transpose(0, 1)
        tables = model.model.rotary_emb(hidden, position_ids=positions[None])
        arguments = (hidden, tables, causal_mask(len(positions), dtype))
        out, _ = torch.func.functional_call(module, dict(zip(names, values, strict=True)), arguments)
        return out.transpose(0, 1)

    g = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=FLOAT64).to(BFLOAT16)
    runs = [with_gradients(function, [hidden, *values], g) for function in (ours, theirs)]
    return [dict(zip(("y", "hidden", *names), run, strict=True)) for run in runs]


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("name", BLOCK_CASES)
def test_attention_block(name, offset, monkeypatch):
    """Positions need not start at 0. Angles up to 1007 radians carry 1007 x 2^-52 = 2e-13 of rounding in float64."""
    case = CASES[name]
    weights, positions = disk_weights(case), torch.arange(offset, offset + 8)
    hidden = torch.randn(8, 2, case.hidden, generator=torch.Generator().manual_seed(2))
    ours, theirs = run_block(case, weights, positions, hidden, FLOAT32)
    remove_float32_casts(monkeypatch)
    wide = {key: value.double() for key, value in weights.items()}
    ours64, truth = run_block(case, wide, positions, hidden.double(), FLOAT64)
    for key in truth:
        assert_relative(ours64[key], truth[key], 2e-12, key)
        assert_calibrated(ours[key], theirs[key], truth[key], key)


def test_positions_default_to_counting_from_zero():
    case = CASES[BLOCK_CASES[0]]
    prefix = "model.layers.0.self_attn."
    weights = {k.removeprefix(prefix): v for k, v in disk_weights(case).items() if k.startswith(prefix)}
    hidden = torch.randn(6, 2, case.hidden, generator=torch.Generator().manual_seed(2))
    counted = attention_block(hidden, weights, case.model_config(), positions=torch.arange(6))
    spread = attention_block(hidden, weights, case.model_config(), positions=torch.arange(0, 60, 10))
    assert torch.equal(attention_block(hidden, weights, case.model_config()), counted)
    assert not torch.allclose(counted, spread, rtol=1e-2)


def test_linear_sums_in_float32_and_rounds_once():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 3072, generator=generator).to(BFLOAT16) for n in (5, 7))
    exact = x.double() @ w.double().T
    assert linear(x, w).dtype == BFLOAT16
    # Products of bfloat16 are exact in float32; the sum of 3072 is off by 3072 x 2^-24 of the sum of magnitudes at
    # most, then half a unit in the last of 8 places.
    magnitude = x.double().abs() @ w.double().abs().T
    assert ((linear(x, w).double() - exact).abs() <= exact.abs() * 2.0**-8 + magnitude * 3072 * 2.0**-24).all()
    # Values that bfloat16 cannot add up: 256 + 1 + 1 would stay at 256 if rounded after each term.
    ones = torch.tensor([[256.0, 1.0, 1.0]], dtype=BFLOAT16)
    assert linear(ones, torch.ones_like(ones)).item() == 258.0
