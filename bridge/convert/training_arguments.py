"""The training arguments that Megatron-LM finds in a checkpoint which no training wrote."""

from argparse import Namespace
from typing import Any

import torch

from reference.config import ModelConfig
from reference.model_class import ModelClass
from reference.parallelism import Parallelism, hybrid_layer_pattern

# Megatron-LM's training arguments that describe the model: by the config's field, and the same for every MiniMax-M2.
_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "moe_ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "num_experts": "num_local_experts",
    "moe_router_topk": "num_experts_per_tok",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "padded_vocab_size": "vocab_size",
}
_ARCHITECTURE: dict[str, Any] = {
    "group_query_attention": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
    "moe_grouped_gemm": True,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
}
# The layout that one rank has, and a run that has not begun.
_RUN: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "ckpt_format": "torch_dist",
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
}


def common_state(config: ModelConfig, model: ModelClass, dtype: torch.dtype, iteration: int) -> dict[str, Any]:
    """What Megatron-LM keeps beside the weights of a model: its training arguments and the iteration."""
    arguments = Namespace(
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()} | _layers(config, model),
        **_ARCHITECTURE,
        **_RUN,
        rotary_base=int(config.rope_theta),
        rotary_percent=config.rotary_dim / config.head_dim,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        iteration=iteration,
    )
    return {"args": arguments, "checkpoint_version": 3.0, "iteration": iteration}


def _layers(config: ModelConfig, model: ModelClass) -> dict[str, Any]:
    """What the arguments of a `HybridModel` say of its layers, and those of a `GPTModel` do not."""
    if model is not ModelClass.HYBRID:
        return {}
    pattern = hybrid_layer_pattern(config, Parallelism())
    return {"num_layers": len(pattern), "hybrid_layer_pattern": pattern, "is_hybrid_model": True}
