"""`gradient_accumulation_fusion` without APEX.

With it a layer's product adds a weight's gradient to the float32 sum (`main_grad`, which `DistributedDataParallel`
makes) itself. Without it the product writes a bfloat16 gradient, which is rounded, and another kernel adds that: for
each weight and microbatch 12 bytes an element are moved instead of 8. Transformer Engine's layers can do it for
themselves (those of experts better: `bridge.model.expert_products`). megatron-core's output layer calls an extension of
APEX; where that is not installed, torch's own product takes its place. Its embedding makes and adds a gradient of all
rows; here only those that were looked up are added to (`compiled.embedding`), where a rank has the whole vocabulary.
"""

from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bridge.model.renamed import with_names


def _add_product(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """total += grad^T x, of `[tokens, in]` and `[tokens, out]`; summed in float32 where total is that."""
    if x.dtype == total.dtype:
        total.addmm_(grad.T, x)
    else:
        torch.addmm(total, grad.T, x, out_dtype=total.dtype, out=total)  # pyright: ignore[reportCallIssue]


# What megatron-core's output layer calls of APEX's `fused_weight_gradient_mlp_cuda`, by the dtype of the sums.
PRODUCTS = SimpleNamespace(wgrad_gemm_accum_fp32=_add_product, wgrad_gemm_accum_fp16=_add_product)


class _Embedding(torch.autograd.Function):
    """The weight's gradient is a side effect of the backward pass; autograd is handed one that nobody reads.

    As megatron-core's output layer does: so `DistributedDataParallel` learns that the gradient is there.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Any) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        add_rows(grad, tokens, weight.main_grad)
        weight.grad_added_to_main_grad = True
        return None, layers.get_dummy_wgrad(list(weight.shape), weight.dtype)


def _embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.embedding`; where a sum of gradients is kept, they are added to it."""
    if hasattr(weight, "main_grad"):
        return _Embedding.apply(tokens, weight)  # pyright: ignore[reportReturnType]
    return F.embedding(tokens, weight)


def add_rows(grad: Tensor, tokens: Tensor, total: Tensor) -> None:
    """`compiled.embedding`, which needs Triton; that is not everywhere where this file is read."""
    from compiled.embedding import add_embedding_gradient

    add_embedding_gradient(grad, tokens, total)


def _accumulate(module: Any) -> None:
    """Let one layer of megatron-core's add its weights' gradients itself."""
    if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's name
        module.fuse_wgrad_accumulation = True
    elif isinstance(module, layers.ColumnParallelLinear):
        module.gradient_accumulation_fusion = True
        layers.fused_weight_gradient_mlp_cuda = PRODUCTS  # pyright: ignore[reportAttributeAccessIssue]


def _accumulate_rows(embedding: Any) -> None:
    """megatron-core's forward pass of an embedding, in which `F.embedding` is `_embedding`.

    Not where the vocabulary is divided: there each rank looks up its first row for all tokens of others.
    """
    if embedding.tp_group.size() == 1 and embedding.gtp_remat_size == 1:
        forward = with_names(layers.VocabParallelEmbedding.forward, F=SimpleNamespace(embedding=_embedding))
        embedding.forward = MethodType(forward, embedding)


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
    for module in model.modules() if fused else ():
        if alone:
            _accumulate(module)
        if type(module) is layers.VocabParallelEmbedding:
            _accumulate_rows(module)
    return model
