"""MiniMax-M2's megatron-core layer: parameter names, norms that round as transformers', a router that stays float32."""

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RMSNorm, MiniMaxM2TopKRouter

from bridge.layer_spec import Float32Router, FullDimRMSNorm, RMSNorm, minimax_m2_block_spec, minimax_m2_layer_spec
from bridge.provider import build_gpt_model, gpt_model_arguments, transformer_config
from bridge.single_process import model_parallel
from reference.config import ModelConfig

SMALL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=32,
    vocab_size=64,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    intermediate_size=24,
    num_local_experts=4,
    num_experts_per_tok=2,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYER_SHAPES = {
    "input_layernorm.weight": (32,),
    "self_attention.linear_qkv.weight": ((6 + 2 + 2) * 16, 32),
    "self_attention.q_layernorm.weight": (6 * 16,),
    "self_attention.k_layernorm.weight": (2 * 16,),
    "self_attention.linear_proj.weight": (32, 6 * 16),
    "pre_mlp_layernorm.weight": (32,),
    "mlp.router.weight": (4, 32),
    "mlp.router.expert_bias": (4,),
    **{f"mlp.experts.local_experts.{e}.linear_fc1.weight": (2 * 24, 32) for e in range(4)},
    **{f"mlp.experts.local_experts.{e}.linear_fc2.weight": (32, 24) for e in range(4)},
}
SHAPES = {
    "embedding.word_embeddings.weight": (64, 32),
    **{f"decoder.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER_SHAPES.items()},
    "decoder.final_layernorm.weight": (32,),
    "output_layer.weight": (64, 32),
}


@pytest.fixture(autouse=True)
def _groups():
    with model_parallel():
        yield


def _config(**overrides):
    return transformer_config(SMALL, **overrides)


def _router(config):
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "tp_cp", "tp_dp_cp"])
    return Float32Router(config, groups).to(DEVICE)


def test_names_shapes_and_dtypes():
    """The local names; a state dict also holds megatron-core's `_extra_state` keys, whose values are None."""
    state = build_gpt_model(SMALL).state_dict()
    tensors = {name: tensor for name, tensor in state.items() if tensor is not None}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    assert all(name.endswith("._extra_state") for name in state.keys() - tensors.keys())
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in SHAPES if ".router." in name}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.bfloat16}


def test_layer_spec_is_accepted_by_gpt_model():
    config = _config()
    model = GPTModel(config, minimax_m2_layer_spec(config), **gpt_model_arguments(SMALL))
    assert isinstance(model.decoder.layers[1].input_layernorm, RMSNorm)


def test_block_spec_brings_the_final_norm():
    config = _config()
    model = GPTModel(config, minimax_m2_block_spec(config), **gpt_model_arguments(SMALL))
    assert isinstance(model.decoder.final_layernorm, RMSNorm)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_replicated_weights_carry_sequence_parallel(sequence_parallel):
    """megatron-core sums the gradients of weights so marked over the tensor-parallel ranks."""
    config = _config(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    assert RMSNorm(config, 32, 1e-6).weight.sequence_parallel is sequence_parallel
    assert _router(config).weight.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [1, 6])
def test_norms_round_as_transformers(dtype, heads):
    config = _config(params_dtype=dtype)
    theirs = MiniMaxM2RMSNorm(heads * 16, eps=1e-6).to(DEVICE, dtype)
    torch.nn.init.uniform_(theirs.weight, 0.5, 1.5)
    x = 3 * torch.randn(5, 2, heads, 16, device=DEVICE, dtype=dtype)
    expected = theirs(x.flatten(-2))
    for ours in (RMSNorm(config, heads * 16, 1e-6), FullDimRMSNorm(config, 16, 1e-6, num_heads=heads)):
        assert ours.weight.dtype == dtype
        ours.to(DEVICE).load_state_dict(theirs.state_dict())
        shaped = x if isinstance(ours, FullDimRMSNorm) else x.flatten(-2)
        assert torch.equal(ours(shaped).view_as(expected), expected)


@pytest.mark.parametrize(
    "convert",
    [
        lambda model, config: model.bfloat16(),
        lambda model, config: model.half().bfloat16(),
        lambda model, config: model.to(torch.bfloat16),
        lambda model, config: Float16Module(config, model).module,
    ],
    ids=["bfloat16", "half", "to", "Float16Module"],
)
def test_router_stays_float32(convert):
    config = _config()
    router = _router(config)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.expert_bias)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    parameter = router.weight
    neighbour = torch.nn.Linear(2, 2)
    convert(torch.nn.Sequential(router, neighbour), config)
    assert neighbour.weight.dtype == torch.bfloat16
    assert router.weight is parameter
    for name, tensor in router.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_router_follows_its_device():
    router = _router(_config()).to("meta", torch.bfloat16)
    assert {(tensor.device.type, tensor.dtype) for tensor in router.state_dict().values()} == {("meta", torch.float32)}


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_chooses_and_weighs_as_transformers(top_k, dtype):
    theirs = MiniMaxM2TopKRouter(
        MiniMaxM2Config(hidden_size=32, num_local_experts=4, num_experts_per_tok=top_k, rotary_dim=64)
    ).to(DEVICE)
    torch.nn.init.normal_(theirs.weight, std=0.2)
    bias = torch.tensor([0.3, -0.2, 0.1, 0.0], device=DEVICE)
    ours = _router(_config(moe_router_topk=top_k, params_dtype=dtype))
    ours.load_state_dict({"weight": theirs.weight, "expert_bias": bias})

    x = torch.randn(40, 1, 32, device=DEVICE, dtype=dtype)
    logits, weights, indices = theirs(x, bias)
    assert torch.equal(ours.gating(x).flatten(0, 1), logits)
    probs, chosen = ours(x)
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, indices, True))
    # The scores are the same numbers; their sum, taken in another order, may differ by (top_k - 1) roundings.
    torch.testing.assert_close(probs.gather(1, indices), weights, rtol=top_k * 2**-23, atol=0)
    unbiased = logits.topk(top_k).indices
    assert top_k == 4 or not torch.equal(chosen, torch.zeros_like(chosen).scatter(1, unbiased, True))


def test_qk_layernorm_must_be_on():
    with pytest.raises(ValueError, match="set qk_layernorm=True"):
        minimax_m2_layer_spec(TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2))


def test_tensor_parallel_norm_is_refused():
    with pytest.raises(ValueError, match="use TP 1"):
        FullDimRMSNorm(_config(tensor_model_parallel_size=2), 16, 1e-6, num_heads=6)
