"""Layers of experts whose weights are no inputs of autograd, for the processor's time.

Transformer Engine has a weight for each expert, and autograd a node for each weight: it is handed a gradient that
nobody reads, since the layer added the real one to `main_grad` itself, waits for the stream that the weight was wrapped
on, and calls the hook by which `DistributedDataParallel` learns that a gradient is there. With 32 experts that takes a
processor longer than the layer's products take the GPU, which does nothing meanwhile.

Here a layer multiplies as before, by Transformer Engine's grouped product. Its backward pass adds all of its weights'
gradients in one kernel (`compiled.experts`), and calls the hooks itself:

    wrapped = DistributedDataParallel(model.config, config, model)
    prepare_experts(wrapped)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def prepare_experts(wrapped: DistributedDataParallel) -> bool:
    """Do so in every layer that can, and say whether there is one.

    To be called on the stream on which `wrapped` was made. Gradients must be added in float32 (`grad_reduce_in_fp32`).
    """
    layers = [module for module in wrapped.module.modules() if _can(module)]
    overlap = wrapped.ddp_config.overlap_grad_reduce  # or nobody waits for a gradient, and hooks have nothing to do
    for layer in layers:
        hooks = [wrapped._make_backward_post_hook(weight) for weight in _weights(layer)] if overlap else []
        layer.forward = partial(_forward, layer, Hooks(hooks, torch.cuda.current_stream()))
    return bool(layers)


class Hooks(NamedTuple):
    """What tells `DistributedDataParallel` that a weight's gradient is there, one for each weight, or none.

    They are called on the stream on which autograd calls those of other weights: a bucket may have both, and is sent
    from there.
    """

    hooks: Sequence[Callable[..., object]]
    stream: Any

    def call(self, weights: list[Any]) -> None:
        for weight in weights:
            weight.grad_added_to_main_grad = True
        if not self.hooks:
            return
        nothing = weights[0].new_empty(()).expand(weights[0].shape)  # a hook asks for some gradient, and drops it
        for weight in weights:
            weight.grad = nothing
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for hook in self.hooks:
                hook()


def _can(module: nn.Module) -> bool:
    """Whether it is megatron-core's layer of experts in half precision, trained, that adds to `main_grad` itself."""
    of_experts = hasattr(module, "num_gemms") and hasattr(module, "te_quant_params")
    if not (of_experts and getattr(module, "fuse_wgrad_accumulation", False)):
        return False
    layer: Any = module
    if layer.te_quant_params is not None or layer.delay_wgrad_compute or layer.use_bias:
        return False
    weights = _weights(layer)
    return (
        not _computes_otherwise(layer.config)
        and len(weights) == layer.num_gemms
        and all(type(one) is nn.Parameter and one.requires_grad for one in weights)
        and all(one.main_grad.dtype == torch.float32 and one.dtype in HALF for one in weights)
        and all(size % 8 == 0 for size in weights[0].shape)
    )


def _computes_otherwise(config: TransformerConfig) -> bool:
    """Settings with which Transformer Engine's layer does more than multiply, or is not called, or captured in a graph.

    What is captured cannot send numbers of rows to the GPU.
    """
    quantised = config.fp8 or config.fp4 or config.enable_autocast
    modules: Any = config.cuda_graph_modules  # a list, once the config is made
    captured = config.cuda_graph_impl != "none" and (not modules or CudaGraphModule.moe in modules)
    return bool(quantised or config.cpu_offloading or config.use_transformer_engine_op_fuser or captured)


def _forward(layer: Any, hooks: Hooks, x: Tensor, m_splits: Sequence[int] | Tensor) -> tuple[Tensor, None]:
    """As megatron-core's layer: the output, and no bias; `m_splits` are the experts' numbers of tokens."""
    rows = m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits)
    if torch.is_grad_enabled() and not x.requires_grad:  # all before it is frozen; the weights are not
        x = x.detach().requires_grad_()
    return _Products.apply(x.contiguous(), layer, hooks, rows), None  # pyright: ignore[reportReturnType]


class _Products(torch.autograd.Function):
    """The weights' gradients are a side effect of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, hooks: Hooks, rows: list[int]) -> Tensor:
        weights = _weights(layer)
        output = x.new_empty(x.shape[0], weights[0].shape[0])
        multiply(weights, x, output, rows, layout="TN")
        ctx.save_for_backward(x)
        ctx.layer, ctx.hooks, ctx.rows = layer, hooks, rows
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,), weights, grad = ctx.saved_tensors, _weights(ctx.layer), grad.contiguous()
        grad_x = torch.empty_like(x)
        multiply(weights, grad, grad_x, ctx.rows, layout="NN", grad=True, use_split_accumulator=True)
        add_gradients(x, grad, [weight.main_grad for weight in weights], ctx.rows)
        ctx.hooks.call(weights)
        return grad_x, None, None, None


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
