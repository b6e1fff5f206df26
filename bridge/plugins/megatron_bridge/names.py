"""What megatron-bridge's own modules for MiniMax-M2 document, under their names and with their signatures.

Code that is written against `megatron.bridge.models.minimax_m2` runs with these, and then its gradients are right: the
norms sum over the tensor-parallel ranks in the backward pass too. Errors are ours: float8 without scales is one.
"""

from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

import compiled
from bridge.model import layer_spec, qk_norm
from compiled.fp8 import dequantize_blockwise
from compiled.norm.collectives import GroupGetter
from reference.config import FP8_BLOCK

_FP8_BLOCK_SIZE = FP8_BLOCK


def _dequant_fp8_blockwise(
    weight: Tensor, scale_inv: Tensor, *, block_size: int = FP8_BLOCK, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """value = float8 * scale_inv of its block, rounded once.

    Raises:
        ValueError: the scales do not cover exactly the weight's blocks, or one of them or a code is not finite.
    """
    return dequantize_blockwise(weight, scale_inv, block_size=block_size, dtype=dtype)


def _get_tp_group() -> ProcessGroup | None:
    """megatron-core's tensor-parallel group; None where there is none yet."""
    group: Any = get_tensor_model_parallel_group(check_initialized=False)  # also declared to be a rank outside of it
    return group


class _FullDimRMSNorm(compiled.FullDimRMSNorm):
    """RMSNorm over all heads of all ranks, whose weight is this rank's part; the group is looked up now.

    Raises:
        ValueError: `shard_world_size` parts of `local_dim` are not `global_dim`, or the ranks do not hold them equally
            often.
    """

    def __init__(
        self,
        local_dim: int,
        global_dim: int,
        shard_world_size: int,
        tp_group_getter: GroupGetter,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
    ) -> None:
        if local_dim * shard_world_size != global_dim:
            raise ValueError(
                f"shard_world_size x local_dim must be global_dim: found {shard_world_size} x {local_dim}, and "
                f"{global_dim}; give the number of different parts, whatever the number of ranks"
            )
        super().__init__(local_dim, global_dim, tp_group_getter, eps, dtype)
        self.local_dim, self.shard_world_size = local_dim, shard_world_size


class FullDimQNorm(qk_norm.FullDimQNorm):
    """The query norm for a layer spec's `q_layernorm`; every rank has the weight of all heads."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float = 1e-6) -> None:
        super().__init__(config=config, hidden_size=hidden_size, eps=eps)


class FullDimKNorm(qk_norm.FullDimKNorm):
    """The key norm for a layer spec's `k_layernorm`; every rank has the weight of all heads."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float = 1e-6) -> None:
        super().__init__(config=config, hidden_size=hidden_size, eps=eps)


def minimax_m2_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Our decoder layer; its attention has one norm for queries and keys, and its norm slots are empty."""
    return layer_spec.minimax_m2_layer_spec(config)
