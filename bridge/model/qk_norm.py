"""MiniMax-M2's query and key norms for megatron-core's own attention, in a layer spec that is not ours.

    submodules.self_attention.submodules.q_layernorm = FullDimQNorm
    submodules.self_attention.submodules.k_layernorm = FullDimKNorm

megatron-core treats what is called `q_layernorm` or `k_layernorm` as a weight that every tensor-parallel rank has
whole: `finalize_model_grads` sums its gradient over the ranks, and the gradient norm counts it on rank 0. So that is
what these norms have: the weight of all heads on every rank, of which a rank uses its own heads' part. Its gradient is
zero elsewhere, and the sum is the whole gradient, also where ranks share a key head. (megatron-bridge's have one shard
a rank, and the sum mixes different heads.) Prefer `bridge.model.layer_spec`: its attention norms both in one step.
"""

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from compiled.norm.collectives import process_group_info
from compiled.norm.function import check_channels, head_norm
from compiled.norm.spec import NormSpec


class _ReplicatedFullDimNorm(nn.Module):
    """`weight` has all heads of all ranks; `forward` norms this rank's heads over all of them."""

    heads_field: str

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.ranks = process_group_info(get_tensor_model_parallel_group(check_initialized=False))
        heads = getattr(config, self.heads_field)
        replicas = max(1, self.ranks.size // heads)
        local_dim = heads * hidden_size * replicas // self.ranks.size
        first = self.ranks.rank // replicas * local_dim
        self.own = slice(first, first + local_dim)
        self.spec = NormSpec((heads * hidden_size * replicas,), eps, hidden_size, ())
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight[self.own]
        check_channels(x, weight)
        # replicas=(1,): the sum over them is finalize_model_grads'
        (y,) = head_norm(self.spec, self.ranks, (1,), None, None, [weight], [x])
        return y


class FullDimQNorm(_ReplicatedFullDimNorm):
    """The query norm; megatron-core calls it with `hidden_size` = head_dim."""

    heads_field = "num_attention_heads"


class FullDimKNorm(_ReplicatedFullDimNorm):
    """The key norm; megatron-core calls it with `hidden_size` = head_dim."""

    heads_field = "num_query_groups"
