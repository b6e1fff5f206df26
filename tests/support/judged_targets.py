"""Targets for the judge: layers of megatron-core with one mistake each, written without our modules' code."""

import os
import signal
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from bridge.model.attention import MiniMaxM2SelfAttention
from bridge.model.layer_spec import minimax_m2_layer_spec
from bridge.model.qk_norm import FullDimKNorm, FullDimQNorm
from bridge.model.router import Float32Router


def with_attention(config: Any, module: type, **slots: Any) -> Any:
    """MiniMax-M2's layer with another attention module and other norms in its slots."""
    layer = minimax_m2_layer_spec(config)
    attention = layer.submodules.self_attention
    attention.module = module
    attention.submodules = replace(attention.submodules, **slots)
    return layer


def with_experts(config: Any, **changes: Any) -> Any:
    """MiniMax-M2's layer with another router or other experts."""
    layer = minimax_m2_layer_spec(config)
    mlp = layer.submodules.mlp
    submodules = replace(mlp.keywords["submodules"], **changes)
    layer.submodules.mlp = partial(mlp.func, **mlp.keywords | {"submodules": submodules})
    return layer


# ------------------------------------------------------------------------------------ norms over the heads of all ranks


class ShardedNorm(nn.Module):
    """The norm over all heads as one would write it first; each rank has the weights of its heads."""

    differentiable = True

    def __init__(self, heads: int, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        tp = parallel_state.get_tensor_model_parallel_world_size()
        self.size, self.eps = heads * hidden_size, eps
        self.weight = nn.Parameter(torch.ones(self.size // tp, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.flatten(-2).float()
        squares = wide.square().sum(-1, keepdim=True)
        group = parallel_state.get_tensor_model_parallel_group()
        if self.differentiable:
            squares = all_reduce(squares, group=group)
        else:
            torch.distributed.all_reduce(squares, group=group)  # in place: it has no backward
        return (self.weight * (wide * torch.rsqrt(squares / self.size + self.eps)).to(x.dtype)).view_as(x)


class NormWithoutBackwardSum(ShardedNorm):
    differentiable = False


class QueryNorm(ShardedNorm):
    """For megatron-core's slot, whose name makes `finalize_model_grads` sum the gradients of different heads."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(config.num_attention_heads, config, hidden_size, eps)


class KeyNorm(ShardedNorm):
    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(config.num_query_groups, config, hidden_size, eps)


class OneHeadsWeights(nn.Module):
    """Over all heads, by one head's weights: right as long as those of all heads are the same."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + self.eps)


def one_heads_weights(config):
    return with_attention(config, SelfAttention, q_layernorm=OneHeadsWeights, k_layernorm=OneHeadsWeights)


class AttentionWithOwnNorms(SelfAttention):
    """Norms under names that neither megatron-core nor our tables know."""

    norm: type[ShardedNorm] = ShardedNorm

    def __init__(self, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.q_layernorm = self.k_layernorm = None
        norm = partial(self.norm, config=config, hidden_size=config.kv_channels, eps=config.layernorm_epsilon)
        self.my_q_norm, self.my_k_norm = norm(config.num_attention_heads), norm(config.num_query_groups)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return self.my_q_norm(query), self.my_k_norm(key), value


class AttentionWithoutBackwardSum(AttentionWithOwnNorms):
    norm = NormWithoutBackwardSum


def own_norms(config):
    return with_attention(config, AttentionWithOwnNorms, q_layernorm=FullDimQNorm, k_layernorm=FullDimKNorm)


def backward_sum_missing(config):
    return with_attention(config, AttentionWithoutBackwardSum, q_layernorm=FullDimQNorm, k_layernorm=FullDimKNorm)


def gradients_summed_by_name(config):
    return with_attention(config, SelfAttention, q_layernorm=QueryNorm, k_layernorm=KeyNorm)


# --------------------------------------------------------------------------------------------------- rotation, experts


class AttentionThatRotatesAll(SelfAttention):
    def forward(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        steps = torch.arange(0, self.config.kv_channels, 2).float() / self.config.kv_channels
        length = len(rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb)
        angles = torch.arange(length).float()[:, None] * 5e6**-steps
        both = torch.cat((angles, angles), -1)[:, None, None]
        return super().forward(hidden_states, *args, rotary_pos_emb=(both, both), **kwargs)


def all_channels_rotated(args, config, vp_stage):
    assert args.hidden_size == config.hidden_size
    assert vp_stage is None
    return with_attention(config, AttentionThatRotatesAll, q_layernorm=FullDimQNorm, k_layernorm=FullDimKNorm)


def interleaved(config):
    layer = with_attention(config, SelfAttention, q_layernorm=FullDimQNorm, k_layernorm=FullDimKNorm)
    config.rotary_interleaved = True  # our layer refuses it
    return layer


class RouterWithBiasInTheWeights(Float32Router):
    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        scores = logits.flatten(0, -2).sigmoid() + self.expert_bias
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(self.topk).indices, True)
        weights = torch.where(chosen, scores, 0.0)
        return weights / weights.sum(-1, keepdim=True), chosen


class RouterWithBiasAsParameter(Float32Router):
    """`expert_bias` is a parameter without a gradient, where megatron-core has a buffer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bias = self.expert_bias
        del self.expert_bias
        self.expert_bias = nn.Parameter(bias, requires_grad=False)


class SwappedLinear(ColumnParallelLinear):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        output, bias = super().forward(*args, **kwargs)
        gate, up = output.chunk(2, -1)
        return torch.cat((up, gate), -1), bias


def gate_and_up_swapped(config, vp_stage=None):
    layer = minimax_m2_layer_spec(config)
    experts = layer.submodules.mlp.keywords["submodules"].experts
    swapped = replace(experts.keywords["submodules"], linear_fc1=SwappedLinear)
    return with_experts(config, experts=partial(experts.func, **experts.keywords | {"submodules": swapped}))


class LinearWithBias(RowParallelLinear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"bias": True})


def with_a_bias(config):
    """A weight that MiniMax-M2 does not have; it starts as zeros."""
    return with_attention(config, MiniMaxM2SelfAttention, linear_proj=LinearWithBias)


def per_head_norms(config):
    """megatron-core's own layer, whose norms are over one head."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )


def megatron_routers_and_model(config, args, pre_process=True, post_process=True):
    """A model that a trainer builds itself, of megatron-core's router in float32."""
    from megatron.core.models.gpt import GPTModel

    from bridge.model.layer_spec import block_spec_of

    layer = with_experts(config, router=TopKRouter)
    return GPTModel(
        config,
        block_spec_of(layer, config),
        args.padded_vocab_size,
        args.max_sequence_length,
        pre_process,
        post_process,
        position_embedding_type="rope",
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    )


def hybrid_model(config, args):
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from bridge.model.layer_spec import minimax_m2_hybrid_spec

    return HybridModel(
        replace(config, num_layers=2 * config.num_layers),
        minimax_m2_hybrid_spec(config),
        args.padded_vocab_size,
        args.max_sequence_length,
        hybrid_layer_pattern="*E" * config.num_layers,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    )


def without_norms(config):
    return with_attention(config, SelfAttention, q_layernorm=IdentityOp, k_layernorm=IdentityOp)


class Gathered(torch.autograd.Function):
    """The parts of all ranks, one after the other; the gradient of a part is the sum of what all ranks have for it."""

    sums = True

    @classmethod
    def forward(cls, ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @classmethod
    def backward(cls, ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        if cls.sums:
            torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


class GatheredWithoutSum(Gathered):
    sums = False


class GatheredAttention(nn.Module):
    """Causal attention whose context-parallel ranks gather all keys and values, each for the queries it has."""

    gather = Gathered

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        ranks = group.size()
        pieces = [torch.arange(2 * ranks)[[rank, 2 * ranks - 1 - rank]] for rank in range(ranks)]
        steps = torch.arange(len(query) // 2)
        places = [(piece[:, None] * len(steps) + steps).flatten() for piece in pieces]  # of each rank's tokens
        key, value = (self.gather.apply(x, group) for x in (key, value))
        is_past = torch.cat(places) <= places[group.rank()][:, None]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        made = nn.functional.scaled_dot_product_attention(query, key, value, is_past, scale=self.scale, enable_gqa=True)
        return made.permute(2, 0, 1, 3).flatten(2)


class GatheredWithoutBackwardSum(GatheredAttention):
    """Keys and values get gradients from the queries of their own rank alone."""

    gather = GatheredWithoutSum


def gathered_attention(config):
    return with_attention(config, MiniMaxM2SelfAttention, core_attention=GatheredAttention)


def gathered_without_backward_sum(config):
    return with_attention(config, MiniMaxM2SelfAttention, core_attention=GatheredWithoutBackwardSum)


norm_spec = ModuleSpec(FullDimQNorm)


# ------------------------------------------------------------------------------------------------ that cannot be run


def of_transformer_engine(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, False, True)


def wants_something_else(config, checkpoint):
    return minimax_m2_layer_spec(config)


def makes_a_number(config):
    return 5


def dies(config):
    os.kill(os.getpid(), signal.SIGKILL)


def raises_inside(config):
    raise KeyError("planted")
