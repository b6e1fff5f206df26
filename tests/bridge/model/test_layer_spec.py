"""MiniMax-M2's megatron-core layer: parameter names, norms that round as transformers', a router that stays float32."""

from dataclasses import replace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from support.small_model import DEVICE, SMALL, TOKENS, logits_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RMSNorm, MiniMaxM2TopKRouter

from bridge.model.build import build_gpt_model, build_model
from bridge.model.config import gpt_model_arguments, transformer_config
from bridge.model.layer_spec import RMSNorm, minimax_m2_block_spec, minimax_m2_layer_spec
from bridge.model.process_groups import model_parallel
from bridge.model.router import Float32Router
from reference.model_class import ModelClass
from reference.names import find
from reference.weights import Dialect, Layout

LOCAL_DIALECTS = (Dialect.MEGATRON_LOCAL, Dialect.HYBRID_LOCAL)  # in the order of ModelClass

LAYER_SHAPES = {
    "input_layernorm.weight": (32,),
    "self_attention.linear_qkv.weight": ((6 + 2 + 2) * 16, 32),
    "self_attention.qk_norm.q_weight": (6 * 16,),
    "self_attention.qk_norm.k_weight": (2 * 16,),
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
    return transformer_config(SMALL, backend="local", **overrides)


def _router(config):
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "tp_cp", "tp_dp_cp"])
    return Float32Router(config, groups).to(DEVICE)


def test_names_shapes_and_dtypes():
    """The local names; a state dict also holds megatron-core's `_extra_state` keys, whose values are None."""
    state = build_gpt_model(SMALL, backend="local").state_dict()
    tensors = {name: tensor for name, tensor in state.items() if tensor is not None}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    assert all(name.endswith("._extra_state") for name in state.keys() - tensors.keys())
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in SHAPES if ".router." in name}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.bfloat16}


def test_layer_spec_is_accepted_by_gpt_model():
    config = _config()
    model = GPTModel(config, minimax_m2_layer_spec(config, "local"), **gpt_model_arguments(SMALL))
    assert isinstance(model.decoder.layers[1].input_layernorm, RMSNorm)


def test_block_spec_brings_the_final_norm():
    config = _config()
    model = GPTModel(config, minimax_m2_block_spec(config, "local"), **gpt_model_arguments(SMALL))
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
    ours = RMSNorm(config, heads * 16, 1e-6)
    assert ours.weight.dtype == dtype
    ours.to(DEVICE).load_state_dict(theirs.state_dict())
    # The sum of squares in another order: r may differ in its last bits, which only float32 shows.
    rtol = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0
    torch.testing.assert_close(ours(x.flatten(-2)), expected, rtol=rtol, atol=0)


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
    config = replace(SMALL, num_experts_per_tok=top_k)
    ours = _router(transformer_config(config, backend="local", params_dtype=dtype))
    ours.load_state_dict({"weight": theirs.weight, "expert_bias": bias})

    x = torch.randn(40, 1, 32, device=DEVICE, dtype=dtype)
    logits, weights, indices = theirs(x, bias)
    # On a GPU bfloat16 is multiplied by tensor cores: float32 sums of 32 products, which either side may round.
    terms = x.flatten(0, 1).float().abs() @ theirs.weight.abs().T
    off = terms * (64 * 2**-24 if x.is_cuda and dtype == torch.bfloat16 else 0)
    assert ((ours.gating(x).flatten(0, 1) - logits).abs() <= off).all()
    probs, chosen = ours(x)
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, indices, True))
    # The scores are the same numbers; their sum, taken in another order, may differ by (top_k - 1) roundings.
    rtol = top_k * 2**-23 + 2 * off.max().item()
    torch.testing.assert_close(probs.gather(1, indices), weights, rtol=rtol, atol=0)
    unbiased = logits.topk(top_k).indices
    assert top_k == 4 or not torch.equal(chosen, torch.zeros_like(chosen).scatter(1, unbiased, True))


def test_a_router_of_fake_tensors_has_operators_that_torch_knows():
    """Fake tensors have no values, here not even a GPU."""
    router = _router(_config())
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 2, 32, dtype=torch.bfloat16, device="cuda")
        router.weight = nn.Parameter(torch.empty(4, 32, device="cuda"))
        logits = router.gating(x)
    assert (logits.shape, logits.dtype, logits.device.type) == ((3, 2, 4), torch.float32, "cuda")


@pytest.mark.parametrize("wrap", [minimax_m2_layer_spec, minimax_m2_block_spec])
def test_qk_layernorm_may_be_on_or_off(wrap):
    models = {}
    for on in (True, False):
        config = _config(qk_layernorm=on, params_dtype=torch.float32, bf16=False)
        models[on] = GPTModel(config, wrap(config), **gpt_model_arguments(SMALL))
    models[False].load_state_dict(models[True].state_dict())
    assert torch.equal(logits_of(models[True], TOKENS), logits_of(models[False], TOKENS))


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="found 'apex'"):
        minimax_m2_layer_spec(_config(), "apex")


def test_yarns_scaling_is_refused():
    config = _config()
    config.yarn_rotary_scaling_factor = 4.0
    with pytest.raises(ValueError, match=r"scale cos and sin by 1\.13.*set yarn_rotary_scaling_factor=1"):
        GPTModel(config, minimax_m2_layer_spec(config), **gpt_model_arguments(SMALL))


def _same_weights(gpt, hybrid):
    """`hybrid` gets the weights of `gpt`, under the names that the table gives them; those of both."""
    names = [dict(gpt.named_parameters()), dict(hybrid.named_parameters())]
    key = [{find(name, dialect): name for name in of} for of, dialect in zip(names, LOCAL_DIALECTS, strict=True)]
    state = {find(name, LOCAL_DIALECTS[0]): value for name, value in gpt.state_dict().items() if value is not None}
    theirs = {name: state[find(name, LOCAL_DIALECTS[1])] for name in hybrid.state_dict() if "_extra" not in name}
    hybrid.load_state_dict(theirs, strict=False)
    return [(key[0][which], key[1][which]) for which in key[0]]


@pytest.fixture
def in_one_order():
    """On a GPU an expert's tokens are added up in no fixed order otherwise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("in_one_order")
def test_hybrid_model_equals_gpt_model():
    """Bit for bit: `HybridModel` runs the same operations in the same order, in twice as many layers."""
    gpt, hybrid = (build_model(SMALL, model=kind, params_dtype=torch.float32, backend="local") for kind in ModelClass)
    pairs = _same_weights(gpt, hybrid)
    assert len(pairs) == len(list(gpt.parameters())) == len(list(hybrid.parameters()))
    logits = [logits_of(model, TOKENS) for model in (gpt, hybrid)]
    for one in logits:
        one.square().mean().backward()
    assert torch.equal(*logits)
    for name, theirs in pairs:
        assert torch.equal(gpt.get_parameter(name).grad, hybrid.get_parameter(theirs).grad), name


def test_both_classes_are_initialised_alike():
    """Projections back into the residual stream, by the depth: of attention and experts each once a layer."""
    deep = replace(SMALL, num_hidden_layers=8, hidden_size=256, head_dim=64)
    stds = []
    for kind, dialect in zip(ModelClass, LOCAL_DIALECTS, strict=True):
        model = build_model(deep, model=kind, params_dtype=torch.float32, backend="local")
        weights = [
            value for name, value in model.named_parameters() if find(name, dialect).row.layout is Layout.COLUMNS
        ]
        stds.append(torch.stack(weights).std().item())
    assert stds[0] == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.02)
    assert stds[1] == pytest.approx(stds[0], rel=0.02)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_nothing(mode):
    settings = {
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    }[mode]
    plain = build_gpt_model(SMALL, params_dtype=torch.float32)
    recomputing = build_gpt_model(SMALL, params_dtype=torch.float32, **settings)
    recomputing.load_state_dict(plain.state_dict())
    for model in (plain, recomputing):
        logits_of(model, TOKENS)
        positions = torch.arange(TOKENS.shape[1], device=DEVICE).expand_as(TOKENS)
        model.train()(TOKENS, positions, None, labels=TOKENS).mean().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, recomputing.get_parameter(name).grad), name


def test_no_tokens():
    """Up to core attention and in the layer's norms; the gradients are zeros, and not missing."""
    layer = build_gpt_model(SMALL, backend="local").decoder.layers[0]
    x = torch.zeros(0, 2, SMALL.hidden_size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    query, key, value = layer.self_attention.get_query_key_value_tensors(layer.input_layernorm(x))
    assert (query.shape, key.shape, value.shape) == ((0, 2, 6, 16), (0, 2, 2, 16), (0, 2, 2, 16))
    sum(tensor.sum() for tensor in (query, key, value, layer.pre_mlp_layernorm(x))).backward()
    norm = layer.self_attention.qk_norm
    for weight in (layer.input_layernorm.weight, norm.q_weight, norm.k_weight, layer.pre_mlp_layernorm.weight):
        assert torch.equal(weight.grad, torch.zeros_like(weight))
