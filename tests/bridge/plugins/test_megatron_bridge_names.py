"""The names that megatron-bridge's modules for MiniMax-M2 document, from the plug-in: signatures and arithmetic."""

import inspect
from functools import partial

import pytest
import torch
from support.checks import assert_calibrated
from support.megatron_bridge import CONFIG, plugin
from torch import nn
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RMSNorm

from bridge import model_parallel
from bridge.model.attention import MiniMaxM2SelfAttention
from bridge.model.config import transformer_config
from reference.config import ModelConfig
from reference.fp8 import dequantize_blockwise, quantize_blockwise

# isort: split
from megatron.bridge.models.minimax_m2 import minimax_m2_bridge, minimax_m2_provider
from megatron.core.transformer.attention import SelfAttention

pytestmark = pytest.mark.plugins

MODEL = ModelConfig.from_hf(CONFIG)
HEADS, KEY_HEADS, HEAD_DIM = MODEL.num_attention_heads, MODEL.num_key_value_heads, MODEL.head_dim


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (minimax_m2_bridge, "_FullDimQKNormMapping"),
        (minimax_m2_bridge, "_dequant_fp8_blockwise"),
        (minimax_m2_provider, "_FullDimRMSNorm"),
        (minimax_m2_provider, "_get_tp_group"),
        (minimax_m2_provider, "FullDimQNorm"),
        (minimax_m2_provider, "FullDimKNorm"),
        (minimax_m2_provider, "minimax_m2_layer_spec"),
    ],
)
def test_arguments_have_the_documented_names_order_and_defaults(module, name: str):
    def arguments(value) -> list[tuple]:
        found = inspect.signature(value).parameters.values()
        return [(one.name, one.kind, one.default) for one in found]

    assert arguments(getattr(plugin, name)) == arguments(getattr(module, name))


@pytest.mark.parametrize(
    "name", ["provider_bridge", "mapping_registry", "maybe_modify_loaded_hf_weight", "load_weights_hf_to_megatron"]
)
def test_methods_of_the_bridge_take_the_documented_arguments(name: str):
    ours, theirs = (getattr(one.MiniMaxM2Bridge, name) for one in (plugin, minimax_m2_bridge))
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_dequantisation_is_the_law():
    generator = torch.Generator().manual_seed(0)
    assert plugin._FP8_BLOCK_SIZE == 128
    codes, scale_inv = quantize_blockwise(torch.randn(200, 130, generator=generator), block_size=128)
    for dtype in (torch.bfloat16, torch.float32):
        found = plugin._dequant_fp8_blockwise(codes, scale_inv, dtype=dtype)
        assert torch.equal(found, dequantize_blockwise(codes, scale_inv, block_size=128, dtype=dtype))
    with pytest.raises(ValueError, match="scale"):
        plugin._dequant_fp8_blockwise(codes, scale_inv[:1])  # the host's returns uninitialised memory


def norms_of(heads: int, make) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The norm that `make` makes, `transformers`' own, and that in float64, of the same weight."""
    weight = 1 + 0.3 * torch.randn(heads * HEAD_DIM, generator=torch.Generator().manual_seed(1))
    ours, theirs = make(), MiniMaxM2RMSNorm(heads * HEAD_DIM, eps=1e-6)
    truth = nn.RMSNorm(heads * HEAD_DIM, eps=1e-6, dtype=torch.float64)
    for norm in (ours, theirs, truth):
        norm.weight.data.copy_(weight)
    return ours, theirs, truth


@pytest.mark.parametrize("name", ["_FullDimRMSNorm", "FullDimQNorm", "FullDimKNorm"])
def test_norms_equal_those_of_transformers_forward_and_backward(name: str):
    config = transformer_config(MODEL, params_dtype=torch.float32)
    heads = KEY_HEADS if name == "FullDimKNorm" else HEADS
    size = heads * HEAD_DIM
    make = (
        partial(plugin._FullDimRMSNorm, size, size, 1, plugin._get_tp_group)
        if name == "_FullDimRMSNorm"
        else partial(getattr(plugin, name), HEAD_DIM, config, 1e-6)
    )
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 2, heads, HEAD_DIM, generator=generator)
    cotangent = torch.randn(5, 2, heads, HEAD_DIM, generator=generator)
    with model_parallel():
        results = []
        for norm in norms_of(heads, make):
            own = x.to(norm.weight.dtype, copy=True).requires_grad_()
            y = norm(own) if hasattr(norm, "ranks") else norm(own.flatten(2)).view_as(own)
            y.backward(cotangent.to(y.dtype))
            results.append((y, own.grad, norm.weight.grad))
    for what, *values in zip(("y", "dx", "dw"), *results, strict=True):
        assert_calibrated(*values, name=what)


def test_parts_that_do_not_make_up_the_whole_are_refused():
    with pytest.raises(ValueError, match="shard_world_size x local_dim must be global_dim: found 1 x 8, and 32"):
        plugin._FullDimRMSNorm(8, 32, 1, lambda: None)


def test_the_layer_spec_has_our_attention_and_there_is_no_group_without_ranks():
    attention = plugin.minimax_m2_layer_spec(transformer_config(MODEL)).submodules.self_attention
    assert attention.module is MiniMaxM2SelfAttention
    assert issubclass(attention.module, SelfAttention)
    assert plugin._get_tp_group() is None
