"""MiniMax-M2's query and key norms for megatron-core's own attention, in a layer spec that is not ours.

    submodules.self_attention.submodules.q_layernorm = FullDimQNorm
    submodules.self_attention.submodules.k_layernorm = FullDimKNorm

megatron-core treats what is called `q_layernorm` or `k_layernorm` as a weight that every tensor-parallel rank has
whole: `finalize_model_grads` sums its gradient over the ranks, and the gradient norm counts it on rank 0. So that is
what these norms have: the weight of all heads on every rank, of which a rank uses its own heads' part. Its gradient is
zero elsewhere, and the sum is the whole gradient, also where ranks share a key head. (megatron-bridge's have one shard
a rank, and the sum mixes different heads.) Prefer `bridge.model.layer_spec`: its attention norms both in one step.
"""

from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.transformer_config import TransformerConfig

from compiled import ReplicatedFullDimRMSNorm


class FullDimQNorm(ReplicatedFullDimRMSNorm):
    """The query norm; megatron-core calls it with `hidden_size` = head_dim."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config.num_attention_heads, hidden_size, eps=eps, **_placement(config))


class FullDimKNorm(ReplicatedFullDimRMSNorm):
    """The key norm; megatron-core calls it with `hidden_size` = head_dim."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        groups = config.num_query_groups
        heads = config.num_attention_heads if groups is None else groups
        super().__init__(heads, hidden_size, eps=eps, **_placement(config))


def _placement(config: TransformerConfig) -> dict[str, Any]:
    """Over which ranks, in what dtype and on which device a norm is."""
    return {
        "tp_group_getter": lambda: get_tensor_model_parallel_group(check_initialized=False),
        "dtype": config.params_dtype,
        "device": "cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
    }
