"""MiniMax-M2's layer for megatron-core, from local modules: no Transformer Engine, so it also runs on a CPU.

Three modules are ours, because megatron-core's own compute something else:

- `FullDimRMSNorm`: megatron-core norms each query or key head by itself; MiniMax-M2 norms a token's heads together.
- `RMSNorm`: Hugging Face's two roundings, and sequence parallelism, which megatron-core's local norm refuses.
- `Float32Router`: the checkpoint's router weight is float32; megatron-core would cast it to `params_dtype`.

Pass `minimax_m2_block_spec` to `GPTModel`. `minimax_m2_layer_spec`, one layer, is accepted there too, but megatron-core
then takes the final norm from its own defaults.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Float32
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from reference.norm import full_dim_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """RMSNorm over the hidden size, as `reference.norm.rms_norm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_weight(config, hidden_size)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Float[Tensor, "seq batch hidden"]) -> Float[Tensor, "seq batch hidden"]:
        return rms_norm(x, self.weight, eps=self.eps)


class FullDimRMSNorm(nn.Module):
    """RMSNorm over all `num_heads` heads of a token at once, as `reference.norm.full_dim_rms_norm`.

    megatron-core names the size of one head `hidden_size` when it builds a query or key norm.

    Raises:
        ValueError: the heads are spread over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, num_heads: int) -> None:
        super().__init__()
        if config.tensor_model_parallel_size > 1:
            raise ValueError(
                f"tensor_model_parallel_size is {config.tensor_model_parallel_size}, and MiniMax-M2's query and key "
                "norms span all heads: this needs the compiled modules, which are not available yet: use TP 1"
            )
        self.eps = eps
        self.weight = _norm_weight(config, num_heads * hidden_size)

    def forward(self, x: Float[Tensor, "seq batch heads head_dim"]) -> Float[Tensor, "seq batch heads head_dim"]:
        return full_dim_rms_norm(x, self.weight, eps=self.eps)


class _RouterLogits(torch.autograd.Function):
    """x @ weight.T in float32, keeping for the backward pass x as it came and not its float32 copy."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x.float(), weight)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_weight = grad_output.flatten(0, -2).T @ x.flatten(0, -2).float()
        return (grad_output @ weight).to(x.dtype), grad_weight


class Float32Router(TopKRouter):
    """megatron-core's top-k router, with `weight` and `expert_bias` float32 whatever the model's dtype is.

    Source: `transformers` minimax_m2: MiniMaxM2TopKRouter; the released checkpoints' `block_sparse_moe.gate`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.to(torch.cuda.current_device())  # megatron-core puts only the bias there, and the weight at first use

    def reset_parameters(self) -> None:
        """Initialise the weight and leave it in float32."""
        if self.config.perform_initialization:
            self.config.init_method(self.weight)
        self.weight.sequence_parallel = self.config.sequence_parallel

    def gating(self, input: Float[Tensor, "seq batch hidden"]) -> Float32[Tensor, "seq batch experts"]:
        """Logits in float32.

        With Transformer Engine installed, megatron-core would take its matrix product, which computes float32 in
        TensorFloat-32 (seen on an H200: error 2e-4, not 5e-7) and refuses a float32 weight with a bfloat16 input.
        """
        return _RouterLogits.apply(input, self.weight)

    def routing(
        self, logits: Float32[Tensor, "seq batch experts"], padding_mask: Bool[Tensor, "seq batch"] | None = None
    ) -> tuple[Float32[Tensor, "tokens experts"], Bool[Tensor, "tokens experts"]]:
        """Choose experts and weigh them; megatron-core does not normalise the weight of a single chosen expert."""
        probs, routing_map = super().routing(logits, padding_mask)
        if self.topk == 1:
            probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)
        return probs, routing_map

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Router":
        """Follow `.to(device)` and not `.bfloat16()`, so that no bits are lost on the way to a float32 checkpoint."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


def minimax_m2_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One MiniMax-M2 decoder layer.

    Raises:
        ValueError: `config.qk_layernorm` is off.
    """
    if not config.qk_layernorm:
        raise ValueError(
            "MiniMax-M2 norms its queries and keys, but config.qk_layernorm is False: "
            "set qk_layernorm=True, or build the config with bridge.provider.transformer_config"
        )
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=partial(FullDimRMSNorm, num_heads=config.num_attention_heads),
        k_layernorm=partial(FullDimRMSNorm, num_heads=config.num_query_groups),
    )
    expert = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    moe = MoESubmodules(router=Float32Router, experts=partial(SequentialMLP, submodules=expert))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=partial(MoELayer, submodules=moe),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def minimax_m2_block_spec(config: TransformerConfig, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage (and virtual stage), and the final norm."""
    layers = [minimax_m2_layer_spec(config)] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _norm_weight(config: TransformerConfig, size: int) -> nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    return nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
