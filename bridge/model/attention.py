"""megatron-core's self-attention with MiniMax-M2's norm over all heads, right at every tensor-parallel size.

megatron-core's own slots for a query and a key norm stay empty, for three reasons. It fills them with two modules, so
with two all-reduces. `finalize_model_grads` sums over the tensor-parallel ranks every gradient whose parameter's name
has `q_layernorm` or `k_layernorm` in it, which adds up gradients of different heads. And it splits and rotates in
copies of its own. Here one `compiled.FullDimQKNorm` reads the heads out of the fused projection's result, norms and,
outside of inference, rotates them, and writes their gradients back in place.

Only methods that every attention layer of megatron-core goes through are overridden: `GPTModel` and `HybridModel`,
recomputation, KV caches, packed sequences and context parallelism work as they do there. Where megatron-core would
compute something else without a word, or fail with an assertion, `forward` raises a `ValueError`.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import deprecate_inference_params, get_pg_rank, get_pg_size
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bridge.model.attention_mask import check_not_ignored, merged_with_causal
from bridge.model.process_groups import check_group_sizes
from bridge.model.safe_settings import check_settings
from compiled import FullDimQKNorm
from reference.weights import QK_NORMS, TABLE, Dialect, Row


def _in_attention(row: Row, dialect: Dialect) -> str:
    (name,) = row.names[dialect]
    return name.partition(".self_attention.")[2]


# This module's norm weights, and the keys that checkpoints of megatron-core have for them.
CHECKPOINT_KEYS = {
    _in_attention(row, Dialect.MEGATRON_TE): _in_attention(row, Dialect.TORCH_DIST)
    for row in TABLE
    if row.layout in QK_NORMS
}

KEPT_TABLES = "_minimax_m2_tables"  # the attribute of the angles that keeps cos and sin with them


class MiniMaxM2SelfAttention(SelfAttention):
    """`SelfAttention` whose queries and keys are normed over all heads of all ranks.

    Raises:
        ValueError: settings of the config do not work together or with this attention (`bridge.model.safe_settings`),
            or ask for YaRN's scaling; or its parallel sizes are not those of megatron-core's process groups.
    """

    def __init__(
        self, config: TransformerConfig, submodules: SelfAttentionSubmodules, layer_number: int, **kwargs: Any
    ) -> None:
        check_settings(config)
        none = IdentityOp if config.qk_layernorm else None
        empty = replace(submodules, q_layernorm=none, k_layernorm=none)
        super().__init__(config, empty, layer_number, **kwargs)
        if self.pg_collection.tp is get_tensor_model_parallel_group(check_initialized=False):
            check_group_sizes(config)  # and not of groups that a host has made for itself
        if self._yarn_concentration_factor != 1:
            raise ValueError(
                f"the config's YaRN settings scale cos and sin by {self._yarn_concentration_factor}, which MiniMax-M2 "
                "does not: set yarn_rotary_scaling_factor=1, or leave the yarn_ settings out"
            )
        self.q_layernorm = self.k_layernorm = None
        self.qk_norm = FullDimQKNorm(
            config.num_attention_heads,
            config.num_query_groups or config.num_attention_heads,
            self.hidden_size_per_attention_head,
            lambda: self.pg_collection.tp,
            eps=config.layernorm_epsilon,
            dtype=config.params_dtype,
        ).to("cpu" if config.use_cpu_initialization else torch.cuda.current_device())
        mark_sharded(self.qk_norm.q_weight, replica=0)
        mark_sharded(self.qk_norm.k_weight, replica=self.qk_norm.ranks.rank % self.qk_norm.replicas)
        self._angles: Tensor | None = None
        self._packed: PackedSeqParams | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's; the rotation moves into the norm unless a cache needs plain heads.

        Args:
            attention_mask: None for causal attention. On the local backend, outside of inference, a bool mask, True
                where a key is not to be seen, hides keys beside those that come after the query: `[batch, 1, 1, keys]`
                of padding, or `[batch or 1, 1, queries, keys]`. A query that may see no key sees all of them alike, as
                in megatron-core: leave it out of the loss. Transformer Engine's attention is causal whatever the mask,
                and packed sequences are told apart by their borders alone.

        Raises:
            ValueError: packed sequences without Transformer Engine; a mask of another dtype or shape, or with
                Transformer Engine one of padding; `flash_decode` where it would be wrong.
        """
        inference_context = deprecate_inference_params(inference_context, inference_params)
        packed = packed_seq_params if packed_seq_params is not None and packed_seq_params.qkv_format == "thd" else None
        if packed is not None and isinstance(self.core_attention, DotProductAttention):
            raise ValueError(
                "packed_seq_params has qkv_format='thd', but megatron-core's local DotProductAttention does not take "
                "packed sequences: use the layer spec with backend='transformer_engine', or unpack them"
            )
        if inference_context is None:
            if attention_mask is not None and packed is None and self.attn_mask_type is AttnMaskType.causal:
                attention_mask = self._beside_causal(attention_mask, hidden_states)
            if rotary_pos_emb is not None:
                self._angles = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
                self._packed, rotary_pos_emb = packed, None
        elif self.config.flash_decode:
            _check_flash_decode(rotary_pos_cos)
        try:
            return super().forward(
                hidden_states,
                attention_mask,  # pyright: ignore[reportArgumentType]  # it takes None
                key_value_states,
                inference_context,
                rotary_pos_emb,
                rotary_pos_cos,
                rotary_pos_sin,
                rotary_pos_cos_sin,
                attention_bias,
                packed_seq_params,
                sequence_len_offset,
            )
        finally:
            self._angles = self._packed = None

    def _beside_causal(self, mask: Tensor, hidden_states: Tensor) -> Tensor:
        """The mask that core attention is to get, so that attention is causal and `mask` counts.

        Raises:
            ValueError: core attention would ignore `mask`, or it is not one.
        """
        if not isinstance(self.core_attention, DotProductAttention):
            check_not_ignored(mask)
            return mask
        softmax = self.core_attention.scale_mask_softmax
        if softmax.window_size is not None or (softmax.scaled_masked_softmax_fusion and softmax.input_in_float16):
            raise ValueError(
                f"attention_mask is given, but with window_size={softmax.window_size} and masked_softmax_fusion="
                f"{softmax.scaled_masked_softmax_fusion} megatron-core's local attention leaves it out: set "
                "window_size=None and masked_softmax_fusion=False, or give None"
            )
        parts = get_pg_size(self.pg_collection.tp) if self.config.sequence_parallel else 1
        return merged_with_causal(mask, batch=hidden_states.shape[1], length=len(hidden_states) * parts)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's query, key and value heads: projected, normed, and rotated if `forward` said so."""
        mixed_qkv: Any = super().get_query_key_value_tensors(
            hidden_states, key_value_states, output_gate, split_qkv=False
        )[0]
        if self._angles is None:
            return self.qk_norm.forward_fused(mixed_qkv)
        if self._packed is None:
            tables = kept_tables(self._angles, mixed_qkv.dtype)
        else:
            positions = packed_positions(self._packed, len(mixed_qkv), self.pg_collection.cp)
            tables = _tables(self._angles[positions], mixed_qkv.dtype)
        return self.qk_norm.forward_fused(mixed_qkv, *tables)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron-core's; the norms' weights under the keys that its checkpoints use."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, key in CHECKPOINT_KEYS.items():
            sharded[prefix + name].key = prefix + key
        return sharded


def mark_sharded(weight: nn.Parameter, *, replica: int) -> None:
    """Tell megatron-core that a weight is a shard: it then counts it once in the gradient norm, on the first replica.

    megatron-core counts a parameter that is not marked on tensor-parallel rank 0 only, which holds a first replica.
    """
    set_tensor_model_parallel_attributes(weight, is_parallel=replica == 0, dim=0, stride=1)


def kept_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, kept with them: megatron-core gives all layers, and steps of one length, one tensor.

    Anew where they would not be what is asked for: the angles were changed in place, or the dtype is another. And where
    what is kept may not be used or made: a CUDA graph reads the angles at each replay, and torch.compile traces the
    work; autograd does not take what inference mode made.
    """
    if torch.compiler.is_compiling() or angles.is_inference() or torch.is_inference_mode_enabled():
        return _tables(angles, dtype)
    if angles.is_cuda and torch.cuda.is_current_stream_capturing():
        return _tables(angles, dtype)
    made_of = angles._version, dtype
    kept = getattr(angles, KEPT_TABLES, None)
    if kept is None or kept[0] != made_of:
        kept = made_of, _tables(angles, dtype)
        setattr(angles, KEPT_TABLES, kept)
    return kept[1]


def _tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`angles`: `[seq, batch or 1, 1, rotary_dim]`, both halves the same."""
    angles = angles[:, :, 0, : angles.shape[-1] // 2]
    if angles.shape[1] == 1:
        angles = angles[:, 0]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def packed_positions(packed: PackedSeqParams, tokens: int, context: ProcessGroup) -> Tensor:
    """The position of each of this rank's tokens in its own sequence, computed where `cu_seqlens` is.

    Of n context-parallel ranks, each holds of every sequence, cut into 2n chunks, the chunks `rank` and 2n - 1 - `rank`
    (megatron-core: `_get_thd_freqs_on_this_cp_rank`). A batch may have a group of its own, or turn the ranks off
    (`TEDotProductAttention.forward`).
    """
    context = packed.cp_group or (context if packed.local_cp_size is None else None)
    rank, size = get_pg_rank(context), get_pg_size(context)
    starts = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    starts = starts // size
    index = torch.arange(tokens, dtype=starts.dtype, device=starts.device)
    sequence = torch.bucketize(index, starts, right=True) - 1
    position = index - starts[sequence]
    if size == 1:
        return position
    chunk = (starts.diff() // 2)[sequence]
    return position + chunk * (rank + 2 * (size - 1 - rank) * (position >= chunk))


def _check_flash_decode(cos: Tensor | None) -> None:
    """Without an active engine megatron-core leaves out the rotation; without flash-attn it rotates by other angles.

    Its HybridModel gives attention no `rotary_pos_cos`, and then the rotation is left out too.

    Raises:
        ValueError: one of these is the case.
    """
    if not InferenceMode.is_active():
        raise ValueError(
            "flash_decode is on, and there is an inference context, but no inference engine is active: megatron-core "
            "would not rotate queries and keys. Run inside megatron.core.inference.utils.InferenceMode.active(), or "
            "set flash_decode=False"
        )
    if cos is None:
        raise ValueError(
            "flash_decode is on, but attention is not given rotary_pos_cos, as in megatron-core's HybridModel: queries "
            "and keys would not be rotated. Use GPTModel, or set flash_decode=False"
        )
    if megatron_attention.flash_attn_with_kvcache is None or rope_utils.apply_rotary_emb_flash is None:
        raise ValueError(
            "flash_decode is on, but flash-attn 2 cannot be imported, and it needs that package's kernels for the "
            "rotation and the cache: install flash-attn, or set flash_decode=False"
        )
