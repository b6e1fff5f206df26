"""What makes a `TransformerConfig` MiniMax-M2's: fields with which weights of the same shapes are another model.

Weights say nothing of how many experts a token has, of a window or of a rotation, so that a wrong value fails nowhere.
`check_architecture` is asked with every `check_settings`, where the model's sizes are not known; `check_same_model` by
whatever fills a model from a checkpoint. Rates of dropout, jitter and capacity are a training's choice, and not here.
"""

from collections.abc import Mapping
from math import isclose
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from reference.config import ModelConfig
from reference.rope import inverse_frequencies

# TransformerConfig field: ModelConfig field
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",  # equal to the next, or megatron-core copies the config for every layer
    "moe_ffn_hidden_size": "intermediate_size",
    "num_moe_experts": "num_local_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_aux_loss_coeff": "router_aux_loss_coef",
    "layernorm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
}
# Those that shapes do not tell: as many channels may be other heads.
UNSEEN = ("num_attention_heads", "num_query_groups", "kv_channels", "moe_router_topk", "layernorm_epsilon")

# TransformerConfig field: the values with which the model is MiniMax-M2. The first is what to set.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "window_size": (None, (-1, -1), (-1, 0)),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "gated_linear_unit": (True,),
    "activation_func": (torch.nn.functional.silu,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "moe_router_score_function": ("sigmoid",),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_force_biased": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_latent_size": (None,),
    "use_mup": (False,),
}


def check_architecture(megatron: TransformerConfig) -> None:
    """Refuse a configuration that is no MiniMax-M2 of any size.

    Raises:
        ValueError: names the field, the value found and the one to set.
    """
    for name, allowed in ALLOWED.items():
        found = getattr(megatron, name)
        is_off = not found and not allowed[0]  # None, False or 0, as hosts have it
        if not is_off and (tuple(found) if isinstance(found, list) else found) not in allowed:
            raise ValueError(
                f"{name}={shown(found)}: with the same weights that is another model than MiniMax-M2; set "
                f"{name}={shown(allowed[0])}"
            )


def check_sizes(given: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuse `TransformerConfig` fields that contradict the model's own config where no weight's shape would tell.

    Raises:
        ValueError: names the field, the value found, and what the model's config says.
    """
    for name in UNSEEN:
        expected = getattr(config, SIZES[name])
        found = given.get(name, expected)
        if found is None or not isclose(found, expected, rel_tol=1e-6):
            raise ValueError(
                f"{name}={found!r}: the model's config has {SIZES[name]}={expected!r}; leave {name} out, or set "
                f"{name}={expected!r}"
            )


def check_same_model(chunk: nn.Module, config: ModelConfig) -> None:
    """Refuse a model that would compute something else with this model's weights, though their shapes are the same.

    Raises:
        ValueError: the `TransformerConfig` is of no MiniMax-M2 or of another one, or the rotation of queries and keys
            is another; says what was found, what was expected and what to set.
    """
    megatron: Any = chunk.config
    check_architecture(megatron)
    check_sizes(vars(megatron), config)
    _check_rotation(chunk, config)


def _check_rotation(chunk: Any, config: ModelConfig) -> None:
    said = (
        f"build the model with position_embedding_type='rope', rotary_base={config.rope_theta:g} and "
        f"rotary_percent={config.rotary_dim / config.head_dim:g} (bridge.model.config.gpt_model_arguments)"
    )
    kind = getattr(chunk, "position_embedding_type", "rope")
    if kind != "rope":
        raise ValueError(f"position_embedding_type={kind!r}: queries and keys would not be rotated as trained; {said}")
    rotary: Any = getattr(chunk, "rotary_pos_emb", None)
    if not isinstance(getattr(rotary, "inv_freq", None), torch.Tensor):
        return  # a module of another kind, which says nothing of its frequencies
    if getattr(rotary, "seq_len_interpolation_factor", None) not in (None, 1):
        raise ValueError(
            f"seq_len_interpolation_factor={rotary.seq_len_interpolation_factor!r}: positions would be scaled, which "
            "the checkpoint was not trained with; leave it out"
        )
    found, expected = rotary.inv_freq.float().cpu(), inverse_frequencies(config.rotary_dim, config.rope_theta)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=0):
        raise ValueError(
            f"rotary_pos_emb.inv_freq: found {_frequencies(found)}, expected {_frequencies(expected)} for "
            f"rope_theta={config.rope_theta:g} and rotary_dim={config.rotary_dim}; {said}"
        )


def _frequencies(values: torch.Tensor) -> str:
    return f"{values.numel()} from {values.max():.4g} down to {values.min():.4g}"


def shown(value: Any) -> str:
    """A setting's value as an error names it."""
    return value.__name__ if callable(value) else repr(value)
