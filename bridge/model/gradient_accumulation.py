"""`gradient_accumulation_fusion` without APEX.

With it a layer's product adds a weight's gradient to the float32 sum (`main_grad`, which `DistributedDataParallel`
makes) itself. Without it the product writes a bfloat16 gradient, which is rounded, and another kernel adds that: for
each weight and microbatch 12 bytes an element are moved instead of 8. Transformer Engine's layers can do it for
themselves (those of experts better: `bridge.model.expert_products`). megatron-core's output layer calls an extension of
APEX; where that is not installed, torch's own product takes its place.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def _add_product(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """total += grad^T x, of `[tokens, in]` and `[tokens, out]`; products are summed in float32."""
    if x.dtype == total.dtype:
        total.addmm_(grad.T, x)
    else:
        torch.addmm(total, grad.T, x, out_dtype=total.dtype, out=total)  # pyright: ignore[reportCallIssue]


# What megatron-core's output layer calls of APEX's `fused_weight_gradient_mlp_cuda`, by the dtype of the sums.
PRODUCTS = SimpleNamespace(wgrad_gemm_accum_fp32=_add_product, wgrad_gemm_accum_fp16=_add_product)


def build_accumulating[Model: nn.Module](
    make: Callable[..., Model], config: TransformerConfig, **arguments: Any
) -> Model:
    """`make(config=config, **arguments)`, with `gradient_accumulation_fusion` where `config` asks for it.

    Of other layers than Transformer Engine's, and where APEX is installed, megatron-core does it alone.
    """
    asked = config.gradient_accumulation_fusion
    fused = asked and config.transformer_impl == "transformer_engine"
    alone = fused and not layers._grad_accum_fusion_available
    config.gradient_accumulation_fusion = asked and not alone
    try:
        model = make(config=config, **arguments)
    finally:
        config.gradient_accumulation_fusion = asked
    modules: Any = model.modules()
    for module in modules if alone else ():
        if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's name
            module.fuse_wgrad_accumulation = True
        elif isinstance(module, layers.ColumnParallelLinear):
            module.gradient_accumulation_fusion = True
            layers.fused_weight_gradient_mlp_cuda = PRODUCTS  # pyright: ignore[reportAttributeAccessIssue]
    return model
