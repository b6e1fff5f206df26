"""megatron-core's self-attention with MiniMax-M2's norm over all heads, right at every tensor-parallel size.

megatron-core's own slots for a query and a key norm stay empty, for three reasons. It fills them with two modules, so
with two all-reduces. `finalize_model_grads` sums over the tensor-parallel ranks every gradient whose parameter's name
has `q_layernorm` or `k_layernorm` in it, which adds up gradients of different heads. And it splits and rotates in
copies of its own. Here one `compiled.FullDimQKNorm` reads the heads out of the fused projection's result, norms and,
outside of inference and packed sequences, rotates them, and writes their gradients back in place.

Only methods that every attention layer of megatron-core goes through are overridden: `GPTModel` and `HybridModel`,
recomputation, KV caches and packed sequences work as they do there.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import get_pg_rank
from torch import Tensor, nn

from compiled import FullDimQKNorm

# This module's parameters, and the keys that checkpoints of megatron-core have for them.
CHECKPOINT_KEYS = {"qk_norm.q_weight": "q_layernorm.weight", "qk_norm.k_weight": "k_layernorm.weight"}

Rotation = tuple[Tensor | None, Tensor | None]


class MiniMaxM2SelfAttention(SelfAttention):
    """`SelfAttention` whose queries and keys are normed over all heads of all ranks.

    Raises:
        ValueError: the config asks for something that would bypass the norm (`fused_single_qkv_rope`,
            `attention_output_gate`, `qk_l2_norm`).
    """

    def __init__(
        self, config: TransformerConfig, submodules: SelfAttentionSubmodules, layer_number: int, **kwargs: Any
    ) -> None:
        for name in ("fused_single_qkv_rope", "attention_output_gate", "qk_l2_norm"):
            if getattr(config, name):
                raise ValueError(f"{name} is on, which MiniMax-M2's attention does not have: set {name}=False")
        none = IdentityOp if config.qk_layernorm else None
        empty = replace(submodules, q_layernorm=none, k_layernorm=none)
        super().__init__(config, empty, layer_number, **kwargs)
        self.q_layernorm = self.k_layernorm = None
        self.qk_norm = FullDimQKNorm(
            config.num_attention_heads,
            config.num_query_groups,
            self.hidden_size_per_attention_head,
            lambda: self.pg_collection.tp,
            eps=config.layernorm_epsilon,
            dtype=config.params_dtype,
        ).to("cpu" if config.use_cpu_initialization else torch.cuda.current_device())
        mark_sharded(self.qk_norm.q_weight, replica=0)
        mark_sharded(self.qk_norm.k_weight, replica=self.qk_norm.ranks.rank % self.qk_norm.replicas)
        self._rotation: Rotation = (None, None)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """As megatron-core's; the rotation moves into the norm unless a cache or packed sequences need plain heads."""
        if inference_context is None and packed_seq_params is None and rotary_pos_emb is not None:
            self._rotation = _tables(rotary_pos_emb, hidden_states.dtype)
            rotary_pos_emb = None
        try:
            return super().forward(
                hidden_states,
                attention_mask,
                key_value_states,
                inference_context,
                rotary_pos_emb,
                *args,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        finally:
            self._rotation = (None, None)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's query, key and value heads: projected, normed, and rotated if `forward` said so."""
        mixed_qkv, _ = super().get_query_key_value_tensors(
            hidden_states, key_value_states, output_gate, split_qkv=False
        )
        return self.qk_norm.forward_fused(mixed_qkv, *self._rotation)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron-core's; the norms' weights under the keys that its checkpoints use, sharded on axis 0."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        ranks, dp_rank, axis = self.qk_norm.ranks, get_pg_rank(metadata["dp_cp_group"]), len(sharded_offsets)
        for (name, key), replicas in zip(CHECKPOINT_KEYS.items(), (1, self.qk_norm.replicas), strict=True):
            sharded[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + key,
                self.get_parameter(name),
                *sharded_offsets,
                (axis, ranks.rank // replicas, ranks.size // replicas),
                replica_id=(0, ranks.rank % replicas, dp_rank),
                prepend_axis_num=axis,
            )
        return sharded


def mark_sharded(weight: nn.Parameter, *, replica: int) -> None:
    """Tell megatron-core that a weight is a shard: it then counts it once in the gradient norm, on the first replica.

    megatron-core counts a parameter that is not marked on tensor-parallel rank 0 only, which holds a first replica.
    """
    set_tensor_model_parallel_attributes(weight, is_parallel=replica == 0, dim=0, stride=1)


def _tables(rotary_pos_emb: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Rotation:
    """cos and sin, [seq, half], from megatron-core's angles, [seq, 1, 1, rotary_dim] (both halves the same)."""
    angles = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
    angles = angles[:, 0, 0, : angles.shape[-1] // 2]
    return angles.cos().to(dtype), angles.sin().to(dtype)
