"""MiniMax-M2 built through mcore-bridge's own API on a host without a GPU, in megatron-core's process groups.

`register` says whose layers: ours, or those that mcore-bridge comes with.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from bridge.model.config import CPU_OVERRIDES

CPU = {**CPU_OVERRIDES, "moe_grouped_gemm": False, "transformer_impl": "local", "variable_seq_lengths": False}
STATED = {"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True}  # as the released config.json


def host_config(hf: dict[str, Any] | str, **overrides: Any) -> Any:
    """mcore-bridge's config of a config.json, or of a checkpoint's folder, for the groups that there are."""
    from mcore_bridge import ModelConfig, hf_to_mcore_config
    from transformers import AutoConfig, MiniMaxM2Config

    import bridge.plugins.mcore_bridge  # noqa: F401  # registers

    tp = parallel_state.get_tensor_model_parallel_world_size()
    parallel = {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    hf_config = AutoConfig.from_pretrained(hf) if isinstance(hf, str) else MiniMaxM2Config(**hf)
    return ModelConfig(**{**hf_to_mcore_config(hf_config), **CPU, **parallel, **overrides})


def host_model(hf: dict[str, Any] | str, params_dtype: torch.dtype, **overrides: Any) -> list[nn.Module]:
    """This rank's chunks."""
    from mcore_bridge import get_mcore_model

    flags = {"bf16": params_dtype == torch.bfloat16}
    return get_mcore_model(host_config(hf, params_dtype=params_dtype, **flags, **overrides))
