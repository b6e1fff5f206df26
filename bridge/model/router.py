"""megatron-core's router, kept in float32.

The checkpoint's router weight is float32, and a choice of experts is a step: megatron-core would cast the weight to
`params_dtype`, and compute its product in TensorFloat-32 where Transformer Engine is there.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float32
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bridge.model.optimizer_groups import keep_float32_apart
from compiled.tracing import is_traced


class Float32Logits(torch.autograd.Function):
    """x @ weight.T in float32, also under autocast, keeping for the backward pass x as it came, not a float32 copy."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), weight)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
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
        keep_float32_apart()
        self.to(torch.cuda.current_device())  # megatron-core puts only the bias there, and the weight at first use

    def reset_parameters(self) -> None:
        """Initialise the weight and leave it in float32."""
        if self.config.perform_initialization:
            assert self.config.init_method is not None  # the config's own __post_init__ sets one
            self.config.init_method(self.weight)
        setattr(self.weight, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010  # read by megatron-core

    def gating(self, input: Float[Tensor, "seq batch hidden"]) -> Float32[Tensor, "seq batch experts"]:
        """Logits in float32; of bfloat16 on a GPU by `compiled.router`.

        With Transformer Engine installed, megatron-core would take its matrix product, which computes float32 in
        TensorFloat-32 (seen on an H200: error 2e-4, not 5e-7) and refuses a float32 weight with a bfloat16 input.
        """
        if input.is_cuda and input.dtype == torch.bfloat16 and not is_traced(input):
            from compiled.router import router_logits  # it needs Triton, which hosts without a GPU may lack

            return router_logits(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])
        return Float32Logits.apply(input, self.weight)

    def routing(
        self, logits: Float32[Tensor, "seq batch experts"], padding_mask: Bool[Tensor, "seq batch"] | None = None
    ) -> tuple[Float32[Tensor, "tokens experts"], Bool[Tensor, "tokens experts"]]:
        """Choose experts and weigh them; megatron-core does not normalise the weight of a single chosen expert.

        With `moe_router_padding_for_quantization` its dispatcher adds to the map in place. Where the router is fused,
        autograd has kept the map for the backward pass, and would refuse one that was changed: it gets one of its own.
        """
        if self.config.moe_router_fusion:
            probs, routing_map = self._fused_routing(logits, padding_mask)
            if self.config.moe_router_padding_for_quantization:
                routing_map = routing_map.clone()
        else:
            probs, routing_map = super().routing(logits, padding_mask)
        if self.topk == 1:
            probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)
        return probs, routing_map

    def _fused_routing(self, logits: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where a logit is NaN, the fused kernel chooses an expert twice, and the dispatcher fails far from the cause.

        So it is not shown them, and the weights of that token are NaN instead, as without fusion.
        """
        unknown = logits.isnan()
        probs, routing_map = super().routing(logits.masked_fill(unknown, 0), padding_mask)
        return probs.masked_fill(unknown.any(-1).view(-1, 1), torch.nan), routing_map

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Router":
        """Follow `.to(device)` and not `.bfloat16()`, so that no bits are lost on the way to a float32 checkpoint."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
