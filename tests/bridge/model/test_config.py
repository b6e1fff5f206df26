"""megatron-core's GPTModel, built from a ModelConfig, computes what transformers' MiniMaxM2ForCausalLM computes.

The weights are copied by hand here, so that the checkpoint code is not part of what is trusted. The yardstick is
transformers' own code run in float64.
"""

import copy

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding

from bridge.model.build import build_gpt_model
from bridge.model.config import CPU_OVERRIDES, gpt_model_arguments, transformer_config
from bridge.model.process_groups import model_parallel
from reference.config import ModelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Float64(TorchFunctionMode):
    """Code that asks for float32 gets float64: transformers does for its norms, softmax, routing and rotation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def _rope(head_dim, rotary_dim, rope_theta=5_000_000):
    """Both dialects at once, because not every transformers 5 reads the first (5.17.0 does not)."""
    factor = rotary_dim / head_dim
    parameters = {"rope_type": "default", "rope_theta": rope_theta, "partial_rotary_factor": factor}
    return {"head_dim": head_dim, "rotary_dim": rotary_dim, "rope_parameters": parameters}


def _transformers_model(heads, groups, rotary_dim, top_k):
    torch.manual_seed(0)
    config = MiniMaxM2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        **_rope(16, rotary_dim),
        num_local_experts=8,
        num_experts_per_tok=top_k,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MiniMaxM2ForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        for layer in model.model.layers:
            layer.mlp.e_score_correction_bias.uniform_(-0.3, 0.3)
    return model.to(DEVICE).train()


def _megatron_names(config, hf):
    """Tensors by transformers' names, as tensors by megatron-core's local names."""
    named = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for i in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"decoder.layers.{i}."
        q, k, v = (
            hf[f"{theirs}self_attn.{x}_proj.weight"].unflatten(0, (config.num_key_value_heads, -1)) for x in "qkv"
        )
        named |= {
            f"{ours}input_layernorm.weight": hf[f"{theirs}input_layernorm.weight"],
            f"{ours}self_attention.linear_qkv.weight": torch.cat([q, k, v], 1).flatten(0, 1),
            f"{ours}self_attention.qk_norm.q_weight": hf[f"{theirs}self_attn.q_norm.weight"],
            f"{ours}self_attention.qk_norm.k_weight": hf[f"{theirs}self_attn.k_norm.weight"],
            f"{ours}self_attention.linear_proj.weight": hf[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}pre_mlp_layernorm.weight": hf[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.router.weight": hf[f"{theirs}mlp.gate.weight"],
        }
        for e in range(config.num_local_experts):
            expert = f"{ours}mlp.experts.local_experts.{e}."
            named[f"{expert}linear_fc1.weight"] = hf[f"{theirs}mlp.experts.gate_up_proj"][e]
            named[f"{expert}linear_fc2.weight"] = hf[f"{theirs}mlp.experts.down_proj"][e]
    return named


def _expert_biases(model):
    return {
        f"decoder.layers.{i}.mlp.router.expert_bias": layer.mlp.e_score_correction_bias
        for i, layer in enumerate(model.model.layers)
    }


def _megatron_model(hf, **settings):
    config = ModelConfig.from_hf(hf.config.to_dict())
    model = build_gpt_model(config, backend="local", perform_initialization=False, **settings)
    model.load_state_dict({**_megatron_names(hf.config, hf.state_dict()), **_expert_biases(hf)})
    return model.train()


def _tokens():
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def _megatron_logits(model, tokens):
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None)


def _backward(logits, tokens):
    cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()


def _transformers_run(model, tokens):
    """Logits, and the gradient of every parameter by megatron-core's name."""
    logits = model(tokens).logits
    _backward(logits, tokens)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), _megatron_names(model.config, gradients)


def _error(found, exact):
    return (found.double() - exact).norm().item()


@pytest.mark.parametrize(
    ("heads", "groups", "rotary_dim", "top_k"),
    [
        pytest.param(4, 4, 4, 1, id="heads-1:1-rotary-1/4-top-1"),
        pytest.param(12, 2, 8, 2, id="heads-6:1-rotary-1/2-top-2"),
        pytest.param(6, 1, 16, 3, id="one-group-rotary-all-top-3"),
        pytest.param(3, 3, 8, 8, id="odd-heads-rotary-1/2-all-experts"),
    ],
)
def test_logits_and_gradients_are_transformers(heads, groups, rotary_dim, top_k):
    """In float32, each at most twice as far from float64 as transformers is."""
    hf = _transformers_model(heads, groups, rotary_dim, top_k)
    exact_hf = copy.deepcopy(hf).double()
    tokens = _tokens()
    with Float64():
        exact_logits, exact = _transformers_run(exact_hf, tokens)
    hf_logits, hf_gradients = _transformers_run(hf, tokens)
    with model_parallel():
        model = _megatron_model(hf, params_dtype=torch.float32, moe_aux_loss_coeff=0.0)
        logits = _megatron_logits(model, tokens)
        _backward(logits, tokens)

    assert _error(logits, exact_logits) <= 2 * _error(hf_logits, exact_logits)
    total = torch.stack([gradient.norm() for gradient in exact.values()]).norm().item()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == exact.keys()
    ratios = {}
    for name, gradient in gradients.items():
        if exact[name].norm() < 1e-12 * total:  # an expert without tokens; a router whose one expert always weighs 1
            assert ".experts." in name or (".router." in name and top_k == 1)
            assert gradient.norm() <= 2**-24 * total, name
        else:
            ratios[name] = _error(gradient, exact[name]) / _error(hf_gradients[name], exact[name])
    worst = max(ratios, key=ratios.get)
    print(f"{_error(logits, exact_logits) / exact_logits.norm():.1e}, worst ratio {ratios[worst]:.2f} ({worst})")
    assert ratios[worst] <= 2, (worst, ratios[worst])


@pytest.mark.parametrize("top_k", [2, 8])
def test_bias_changes_the_experts_chosen(top_k):
    """Otherwise the test above would not notice a bias that is ignored; with all experts chosen it must not matter."""
    hf = _transformers_model(4, 2, 8, top_k)
    with torch.no_grad():
        biased = hf(_tokens()).logits
        for layer in hf.model.layers:
            layer.mlp.e_score_correction_bias.zero_()
        unbiased = hf(_tokens()).logits
    assert torch.allclose(biased, unbiased, atol=1e-4) == (top_k == 8)


def test_bfloat16_logits_are_transformers():
    """With bfloat16 weights and a float32 router, at most twice as far from float64 as transformers is."""
    hf = _transformers_model(12, 2, 8, 8)
    routers = [layer.mlp.gate for layer in hf.model.layers]
    biases = [layer.mlp.e_score_correction_bias.clone() for layer in hf.model.layers]
    weights = [router.weight.data for router in routers]
    hf.bfloat16()
    for layer, weight, bias in zip(hf.model.layers, weights, biases, strict=True):
        layer.mlp.gate.weight.data = weight
        layer.mlp.e_score_correction_bias = bias
    tokens = _tokens()
    with torch.no_grad():
        with Float64():
            exact = copy.deepcopy(hf).double()(tokens).logits
        theirs = hf(tokens).logits
        with model_parallel():
            model = _megatron_model(hf)
            ours = _megatron_logits(model, tokens)
    assert ours.dtype == torch.bfloat16
    print(_error(ours, exact) / exact.norm(), _error(theirs, exact) / exact.norm())
    assert _error(ours, exact) <= 2 * _error(theirs, exact)


@pytest.mark.parametrize("rotary_dim", [32, 64, 128])
@pytest.mark.parametrize("rope_theta", [5_000_000, 10_000])
def test_rotary_angles_are_transformers_bit_for_bit(rotary_dim, rope_theta):
    theirs = MiniMaxM2RotaryEmbedding(MiniMaxM2Config(**_rope(128, rotary_dim, rope_theta))).to(DEVICE)
    config = ModelConfig(
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=8,
        intermediate_size=8,
        num_local_experts=8,
        vocab_size=8,
    )
    with model_parallel():
        ours = build_gpt_model(config).rotary_pos_emb
        angles = ours.get_cos_sin(1000, offset=196_000)
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    expected = theirs(torch.empty(0, device=DEVICE), torch.arange(196_000, 197_000, device=DEVICE)[None])
    assert torch.equal(torch.stack(angles).repeat(1, 1, 2), torch.cat(expected))


def test_rotary_percent_alone_gives_transformers_frequencies():
    """For a `GPTModel` built without `build_gpt_model`."""
    config = MiniMaxM2Config(**_rope(128, 64))
    arguments = gpt_model_arguments(ModelConfig(rotary_dim=64))
    with model_parallel():
        rotary = RotaryEmbedding(
            128, arguments["rotary_percent"], rotary_base=arguments["rotary_base"], use_cpu_initialization=True
        )
    assert torch.equal(rotary.inv_freq, MiniMaxM2RotaryEmbedding(config).inv_freq)


def test_rotary_percent_survives_rounding_down():
    """megatron-core takes int(head_dim * rotary_percent)."""
    for head_dim in (64, 96, 98, 128):
        for rotary_dim in range(2, head_dim + 1, 2):
            percent = gpt_model_arguments(ModelConfig(head_dim=head_dim, rotary_dim=rotary_dim))["rotary_percent"]
            assert percent <= 1
            assert int(head_dim * percent) == rotary_dim


def test_released_model():
    config = transformer_config(ModelConfig(rotary_dim=64))
    expected = {
        "num_layers": 62,
        "hidden_size": 3072,
        "num_attention_heads": 48,
        "num_query_groups": 8,
        "kv_channels": 128,
        "moe_ffn_hidden_size": 1536,
        "num_moe_experts": 256,
        "moe_router_topk": 8,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 0.001,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "attention_softmax_in_fp32": True,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert gpt_model_arguments(ModelConfig(rotary_dim=64)) == {
        "vocab_size": 200064,
        "max_sequence_length": 196608,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "rotary_base": 5e6,
        "share_embeddings_and_output_weights": False,
    }


def test_overrides_win():
    config = transformer_config(ModelConfig(rotary_dim=64), moe_aux_loss_coeff=0.0, pipeline_model_parallel_size=2)
    assert (config.moe_aux_loss_coeff, config.pipeline_model_parallel_size) == (0.0, 2)


def test_dtype_sets_the_mixed_precision_flags():
    config = transformer_config(ModelConfig(rotary_dim=64), params_dtype=torch.float16)
    assert (config.fp16, config.bf16, config.pipeline_dtype) == (True, False, torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the table for hosts without a GPU")
def test_host_without_a_gpu():
    config = transformer_config(ModelConfig(rotary_dim=64))
    assert {name: getattr(config, name) for name in CPU_OVERRIDES} == CPU_OVERRIDES
    assert transformer_config(ModelConfig(rotary_dim=64), bias_dropout_fusion=True).bias_dropout_fusion


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"params_dtype must be one of .* found torch.float8_e4m3fn"):
        transformer_config(ModelConfig(rotary_dim=64), params_dtype=torch.float8_e4m3fn)
