"""The reference is pure: no function changes what it is given, each computes in float64 when asked, shapes are checked.

`CALLS` holds one call of every public function of the package's arithmetic modules; a new function must be added to it.
"""

import copy
import inspect

import pytest
import torch
from jaxtyping import TypeCheckError
from support.checks import assert_relative, fresh_interpreter
from support.oracles import CASES, FLOAT32, FLOAT64, disk_weights

from reference import attention, fp8, model, moe, norm, rope

MODULES = (attention, fp8, model, moe, norm, rope)
CASE = CASES["one_group_full_hd64_top3"]
CONFIG = CASE.model_config()
EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64).to(dtype)


def calls(dtype: torch.dtype) -> dict:
    """name -> (function, positional arguments, keyword arguments), with every real number in `dtype`."""

    def draw(*shape):
        return normal(*shape, dtype=dtype)

    # One set of numbers for every dtype, so that results can be compared.
    weights = {name: value.to(dtype) for name, value in disk_weights(CASE).items()}
    layer = {
        n.removeprefix("model.layers.0."): value for n, value in weights.items() if n.startswith("model.layers.0.")
    }
    attention_weights = {
        n.removeprefix("self_attn."): value for n, value in layer.items() if n.startswith("self_attn.")
    }
    moe_weights = {
        n.removeprefix("block_sparse_moe."): value for n, value in layer.items() if n.startswith("block_sparse_moe.")
    }
    rotated = attention.Heads(*(draw(5, 2, heads, CASE.head_dim) for heads in (CASE.heads, CASE.groups)))
    heads, hidden = (5, 2, 3, 8), (5, 2, CASE.hidden)
    tokens = torch.randint(CASE.vocab, (2, 5), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)
    codes = torch.arange(0, 120, dtype=torch.uint8).view(10, 12).view(fp8.FP8)
    scales = normal(2, 2, dtype=FLOAT32).abs()
    on_grid = fp8.dequantize_blockwise(codes, scales, block_size=8, dtype=dtype)
    law = {"eps": EPS, "global_dim": 48, "replicas": 2, "all_reduce": lambda x: 2 * x}
    shards = [normal(5, 2, 3, 8, dtype=dtype, seed=seed) for seed in range(2)]
    table = [
        (attention.linear, (draw(5, 2, 8), draw(3, 8)), {}),
        (attention.causal_attention, (draw(5, 2, 6, 8), draw(*heads), draw(*heads)), {}),
        (attention.norm_and_rotate, (rotated, attention_weights, CONFIG, positions), {}),
        (attention.attention_block, (draw(*hidden), attention_weights, CONFIG), {"positions": positions}),
        (fp8.scale_grid, ((300, 200),), {}),
        (fp8.check_scale_grid, ((300, 200), (3, 2)), {}),
        (fp8.float32_scales, (scales.to(torch.bfloat16),), {}),
        (fp8.zero_blocks, (codes,), {"block_size": 8, "row_offset": 3}),
        (fp8.check_scale_values, (scales, torch.zeros(2, 2, dtype=torch.bool)), {}),
        (fp8.are_powers_of_two, (torch.ones(2, 2),), {}),
        (fp8.divisors, (scales,), {}),
        (fp8.fresh_scales, (scales, "ue8m0"), {}),
        (fp8.possible_roundings, (dtype,), {}),
        (fp8.check_codes, (codes,), {}),
        (fp8.dequantize_blockwise, (codes, scales), {"block_size": 8, "dtype": dtype}),
        (fp8.quantize_blockwise, (draw(10, 12),), {"block_size": 8}),
        (fp8.requantize_blockwise, (on_grid + torch.eye(10, 12, dtype=dtype), scales), {"block_size": 8}),
        (model.decoder_layer, (draw(*hidden), layer, CONFIG), {}),
        (model.layer_weights, (weights, 1), {}),
        (model.embed, (weights, tokens), {}),
        (model.head, (weights, draw(*hidden), CONFIG), {}),
        (model.forward, (weights, tokens, CONFIG), {}),
        (model.loss, (draw(2, 5, CASE.vocab), tokens), {}),
        (moe.route, (draw(7, 8), draw(6, 8), draw(6)), {"top_k": 3}),
        (moe.expert, (draw(7, 8), draw(6, 8), draw(6, 8), draw(8, 6)), {}),
        (moe.moe_block, (draw(*hidden), moe_weights, CONFIG), {}),
        (moe.tokens_per_expert, (torch.tensor([[0, 2], [2, 3]]), 5), {}),
        (moe.load_balancing_loss, (draw(7, 6),), {"top_k": 3, "coefficient": 0.1}),
        (moe.update_expert_bias, (draw(4), torch.tensor([3, 0, 1, 1])), {"rate": 1e-3}),
        (norm.compute_dtype, (dtype,), {}),
        (norm.rms_norm, (draw(5, 2, 8), draw(8)), {"eps": EPS}),
        (norm.full_dim_rms_norm, (draw(*heads), draw(24)), law),
        (norm.full_dim_rms_norm_backward, (draw(*heads), normal(*heads, dtype=dtype, seed=1), draw(24)), law),
        (norm.simulate_tensor_parallel, (shards, [draw(24)] * 2, shards[::-1]), {"eps": EPS}),
        (rope.inverse_frequencies, (16, 5e6), {"dtype": dtype}),
        (rope.rotary_tables, (positions, 16, 5e6), {"dtype": dtype}),
        (rope.apply_rotary, (draw(*heads), draw(5, 3), draw(5, 3)), {}),
    ]
    return {function.__name__: (function, args, kwargs) for function, args, kwargs in table}


CALLS = calls(FLOAT64)


def tensors(value) -> list[torch.Tensor]:
    """The tensors inside tuples, lists and dictionaries, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, list | tuple) else []


def test_every_public_function_is_called_here():
    public = {
        name
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public == CALLS.keys()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_not_changed(name, dtype):
    function, args, kwargs = calls(dtype)[name]
    before = copy.deepcopy((args, {key: value for key, value in kwargs.items() if key != "all_reduce"}))
    function(*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(tensors((args, kwargs)), tensors(before), strict=True))
    dictionaries = [arg.keys() for arg in args if isinstance(arg, dict)]
    assert dictionaries == [arg.keys() for arg in before[0] if isinstance(arg, dict)]


# No arithmetic on real numbers, or results of another dtype than the arguments by design (codes, scales, counts).
NOT_REAL = {
    "scale_grid", "check_scale_grid", "float32_scales", "zero_blocks", "check_scale_values", "are_powers_of_two",
    "divisors", "fresh_scales", "possible_roundings", "check_codes", "quantize_blockwise", "requantize_blockwise",
    "tokens_per_expert", "compute_dtype", "layer_weights", "embed",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CALLS if name not in NOT_REAL])
def test_float64_is_computed_in_float64(name):
    """Results are float64, agree with the float32 run, and are not float32 numbers: nothing was narrowed on the way."""
    function, args, kwargs = CALLS[name]
    wide = [tensor for tensor in tensors(function(*args, **kwargs)) if tensor.is_floating_point()]
    function, args, kwargs = calls(FLOAT32)[name]
    narrow = [tensor for tensor in tensors(function(*args, **kwargs)) if tensor.is_floating_point()]
    assert wide
    for a, b in zip(wide, narrow, strict=True):
        assert (a.dtype, b.dtype) == (FLOAT64, FLOAT32)
        assert (a != a.to(FLOAT32).to(FLOAT64)).any()
        # Sums of at most some hundred terms in float32, through one or two layers.
        assert_relative(b.to(FLOAT64), a, 1e-4, name)


# --------------------------------------------------------------------------------------------------------------- canary

# A weight of 1 for a hidden size of 8: torch would broadcast it, and the result would look right.
WRONG_SHAPE = """
import torch
from reference.norm import rms_norm
y = rms_norm(torch.ones(2, 8), torch.ones(1), eps=1e-6)
print("accepted", tuple(y.shape))
"""


def test_canary_wrong_shape_is_refused_here():
    with pytest.raises(TypeCheckError, match="rms_norm"):
        norm.rms_norm(torch.ones(2, 8), torch.ones(1), eps=EPS)


def test_canary_wrong_shape_is_refused_in_a_fresh_interpreter_that_asks_for_it():
    """What a spawned rank is; pytest's flag does not reach it, the environment variable does."""
    child = fresh_interpreter(WRONG_SHAPE, typecheck=True)
    assert child.returncode != 0
    assert "jaxtyping.TypeCheckError" in child.stderr
    assert "rms_norm" in child.stderr


def test_canary_a_fresh_interpreter_that_does_not_ask_is_not_checked():
    child = fresh_interpreter(WRONG_SHAPE, typecheck=False)
    assert child.stdout == "accepted (2, 8)\n", child.stderr
