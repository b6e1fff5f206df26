"""Layers of experts whose weights are no inputs of autograd, for the processor's time.

Transformer Engine has a weight for each expert, and autograd a node for each weight: it is handed a gradient that
nobody reads, since the layer added the real one to `main_grad` itself, waits for the stream that the weight was wrapped
on, and calls the hook by which `DistributedDataParallel` learns that a gradient is there. With 32 experts that takes a
processor longer than the layer's products take the GPU, which does nothing meanwhile.

Here a layer multiplies as before, by Transformer Engine's grouped product. Its backward pass adds all of its weights'
gradients in one kernel (`compiled.experts`), and calls the hooks itself:

    config.delay_wgrad_compute = prepare_experts(model)
    wrapped = DistributedDataParallel(model.config, config, model)

This setting, of `DistributedDataParallelConfig`, does nothing but hand a hook to the layer instead of the node, where a
weight has `skip_backward_post_hook`. The model's own `delay_wgrad_compute` is another, and refused.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def prepare_experts(model: nn.Module) -> bool:
    """Do so in every layer that can, and say whether there is one.

    To be called once, before `DistributedDataParallel` and on the stream on which that is made, and given to it as
    `delay_wgrad_compute`; its sums must be float32 (`grad_reduce_in_fp32`).

    Raises:
        ValueError: the model is wrapped already.
    """
    layers = [module for module in model.modules() if _can(module)]
    for layer in layers:
        weights = _weights(layer)
        if any(hasattr(weight, "main_grad") for weight in weights):
            raise ValueError("the model is wrapped already; call prepare_experts before DistributedDataParallel")
        layer.forward = partial(_forward, layer, torch.cuda.current_stream())
        for weight in weights:
            weight.skip_backward_post_hook = True
    return bool(layers)


def _can(module: nn.Module) -> bool:
    """Whether it is megatron-core's layer of experts in half precision, trained, that adds to `main_grad` itself."""
    of_experts = hasattr(module, "num_gemms") and hasattr(module, "te_quant_params")
    if not (of_experts and getattr(module, "fuse_wgrad_accumulation", False)):
        return False
    layer: Any = module
    weights = _weights(layer)
    plain = all(type(one) is nn.Parameter and one.requires_grad for one in weights) and len(weights) == layer.num_gemms
    fits = weights[0].dtype in HALF and all(size % 8 == 0 for size in weights[0].shape)
    otherwise = layer.te_quant_params is not None or layer.delay_wgrad_compute or layer.use_bias
    return plain and fits and not otherwise and not _computes_otherwise(layer.config)


def _computes_otherwise(config: TransformerConfig) -> bool:
    """Settings with which Transformer Engine's layer does more than multiply, or is not called, or captured in a graph.

    What is captured cannot send numbers of rows to the GPU.
    """
    quantised = config.fp8 or config.fp4 or config.enable_autocast
    modules: Any = config.cuda_graph_modules  # a list, once the config is made
    captured = config.cuda_graph_impl != "none" and (not modules or CudaGraphModule.moe in modules)
    return bool(quantised or config.cpu_offloading or config.use_transformer_engine_op_fuser or captured)


def _forward(layer: Any, stream: Any, x: Tensor, m_splits: Sequence[int] | Tensor) -> tuple[Tensor, None]:
    """As megatron-core's layer: the output, and no bias; `m_splits` are the experts' numbers of tokens."""
    rows = m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits)
    if torch.is_grad_enabled() and not x.requires_grad:  # all before it is frozen; the weights are not
        x = x.detach().requires_grad_()
    return _Products.apply(x.contiguous(), layer, stream, rows), None  # pyright: ignore[reportReturnType]


class _Products(torch.autograd.Function):
    """The weights' gradients are a side effect of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, stream: Any, rows: list[int]) -> Tensor:
        weights = _weights(layer)
        output = x.new_empty(x.shape[0], weights[0].shape[0])
        multiply(weights, x, output, rows, layout="TN")
        ctx.save_for_backward(x)
        ctx.layer, ctx.stream, ctx.rows = layer, stream, rows
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,), layer, grad = ctx.saved_tensors, ctx.layer, grad.contiguous()
        weights = _weights(layer)
        grad_x = torch.empty_like(x)
        multiply(weights, grad, grad_x, ctx.rows, layout="NN", grad=True, use_split_accumulator=True)
        add_gradients(x, grad, [weight.main_grad for weight in weights], ctx.rows)
        _call_hooks(layer, weights, ctx.stream)
        return grad_x, None, None, None


def _call_hooks(layer: Any, weights: list[Any], stream: Any) -> None:
    """On the stream on which autograd calls those of other weights: a bucket may have both, and is sent from there."""
    hooks = layer.wgrad_accumulation_and_reduce_hooks
    if len(hooks) != len(weights):
        raise ValueError(
            f"DistributedDataParallel handed {len(hooks)} hooks to a layer of {len(weights)} experts; wrap the model "
            "once, with DistributedDataParallelConfig(delay_wgrad_compute=prepare_experts(model))"
        )
    nothing = weights[0].new_empty(()).expand(weights[0].shape)  # a hook asks for some gradient, and drops it
    for weight in weights:
        weight.grad_added_to_main_grad = True
        weight.grad = nothing
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for hook in hooks:
            hook()


def _weights(layer: Any) -> list[Any]:
    return list(layer._parameters.values())


def multiply(weights: list[Tensor], x: Tensor, out: Tensor, rows: list[int], **how: Any) -> None:
    """Each expert's rows with its weight, by Transformer Engine."""
    from transformer_engine.pytorch.cpp_extensions import (  # pyright: ignore[reportMissingImports]
        general_grouped_gemm,
    )

    none = [None] * len(rows)
    general_grouped_gemm(weights, x.split(rows), [out], none, x.dtype, m_splits=rows, single_output=True, **how)


def add_gradients(x: Tensor, grad: Tensor, total: list[Tensor], rows: list[int]) -> None:
    """`compiled.experts`, which needs Triton; that is not everywhere where this file is read."""
    from compiled.experts import add_weight_gradients

    add_weight_gradients(x, grad, total, rows)
