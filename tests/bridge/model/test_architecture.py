"""Settings that would make another model of the same weights: each is refused by name, wherever a config is taken."""

from typing import Any

import pytest
import torch
from support.small_model import SMALL

from bridge import check_settings
from bridge.model.architecture import ALLOWED
from bridge.model.build import build_model
from bridge.model.config import transformer_config
from bridge.model.process_groups import model_parallel

OTHERS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "apply_residual_connection_post_layernorm": True,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "multi_latent_attention": True,
    "experimental_attention_variant": "dsa",
    "window_size": (4, 0),
    "softmax_type": "off-by-one",
    "softmax_scale": 0.1,
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
    "activation_func_clamp_value": 0.5,
    "glu_linear_offset": 1.0,
    "moe_router_score_function": "sqrtsoftplus",
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_force_biased": 1.0,
    "moe_apply_probs_on_input": True,
    "moe_shared_expert_intermediate_size": 32,
    "moe_latent_size": 16,
    "use_mup": True,
}
SAME: dict[str, Any] = {
    "window_size": (-1, -1),
    "moe_router_topk_scaling_factor": 1.0,
    "moe_apply_probs_on_input": None,
    "moe_aux_loss_coeff": 0.5,
    "init_method_std": 0.5,
    "attention_dropout": 0.1,
    "moe_router_topk": SMALL.num_experts_per_tok,
    "layernorm_epsilon": SMALL.rms_norm_eps,
}


def test_every_field_has_another_value_here() -> None:
    assert OTHERS.keys() == ALLOWED.keys()
    assert all(value not in ALLOWED[name] for name, value in OTHERS.items())


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(name: str) -> None:
    config = transformer_config(SMALL)
    setattr(config, name, OTHERS[name])
    with pytest.raises(ValueError, match=rf"^{name}=.*: with the same weights that is another model .* set {name}="):
        check_settings(config)


@pytest.mark.parametrize("name", ["window_size", "softmax_scale", "moe_router_topk_scaling_factor", "activation_func"])
@pytest.mark.parametrize("model", ["gpt", "hybrid"])
def test_it_is_not_built(name: str, model: str) -> None:
    with model_parallel(), pytest.raises(ValueError, match=f"^{name}="):
        build_model(SMALL, model=model, **{name: OTHERS[name]})


@pytest.mark.parametrize(("name", "value"), SAME.items())
def test_what_is_the_same_model_is_not(name: str, value: Any) -> None:
    assert getattr(transformer_config(SMALL, **{name: value}), name) == value


@pytest.mark.parametrize("model", ["gpt", "hybrid"])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("moe_router_topk", 3, "moe_router_topk=3: the model's config has num_experts_per_tok=2; leave .* set .*=2"),
        ("layernorm_epsilon", 0.1, "layernorm_epsilon=0.1: the model's config has rms_norm_eps=1e-06"),
        ("num_attention_heads", 3, "num_attention_heads=3: the model's config has num_attention_heads=6"),
        ("kv_channels", None, "kv_channels=None: the model's config has head_dim=16"),
    ],
)
def test_overrides_that_contradict_the_model_are_refused(model: str, name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        transformer_config(SMALL, model=model, **{name: value})
