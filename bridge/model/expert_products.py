"""Layers of experts whose weights are no inputs of autograd, for the processor's time.

Transformer Engine has a weight for each expert, and autograd a node for each weight: it is handed a gradient that
nobody reads, since the layer added the real one to `main_grad` itself, waits for the stream that the weight was wrapped
on, and calls a hook of `DistributedDataParallel`. With 32 experts that takes a processor longer than the layer's
products take the GPU, which does nothing meanwhile.

Here a layer multiplies as before, by Transformer Engine's grouped product. Its backward pass adds all of its weights'
gradients in one kernel (`compiled.experts`), and calls the hooks itself. `DistributedDataParallel` hands them out, to
layers whose weights are marked, if its own `delay_wgrad_compute` is set; the model's, which is another, is refused.

    config.delay_wgrad_compute = prepare_experts(model)
    wrapped = DistributedDataParallel(model.config, config, model)

Sums must be float32 (`grad_reduce_in_fp32`).
"""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.enums import CudaGraphModule
from torch import Tensor, nn


def prepare_experts(model: nn.Module) -> bool:
    """Before `DistributedDataParallel`: do so in every layer that can. Says whether there is one."""
    layers = [module for module in model.modules() if _can(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
        for weight in layer.parameters(recurse=False):
            weight.skip_backward_post_hook = True  # pyright: ignore[reportAttributeAccessIssue]  # megatron-core's mark
    return bool(layers)


def _can(module: nn.Module) -> bool:
    """Whether it is a layer of experts in half precision, trained, that adds to `main_grad` where it is called."""
    if not (hasattr(module, "num_gemms") and getattr(module, "fuse_wgrad_accumulation", False)):
        return False
    layer: Any = module
    config, weights = layer.config, list(layer.parameters(recurse=False))
    elsewhere = config.fp8 or config.fp4 or layer.te_quant_params is not None or config.cpu_offloading
    elsewhere = elsewhere or layer.delay_wgrad_compute or layer.use_bias
    captured = CudaGraphModule.moe in config.cuda_graph_modules  # numbers of rows are sent to the GPU
    plain = all(type(one) is nn.Parameter and one.requires_grad for one in weights) and len(weights) == layer.num_gemms
    half = weights[0].dtype in (torch.bfloat16, torch.float16)
    aligned = all(size % 8 == 0 for size in weights[0].shape)
    return plain and half and aligned and not elsewhere and not captured


def _forward(layer: Any, x: Tensor, m_splits: list[int] | Tensor) -> tuple[Tensor, None]:
    """As megatron-core's layer: the output, and no bias; `m_splits` are the experts' numbers of tokens."""
    rows = m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits)
    if torch.is_grad_enabled() and not x.requires_grad:  # all before it is frozen; the weights are not
        x = x.detach().requires_grad_()
    return _Products.apply(x.contiguous(), layer, rows), None  # pyright: ignore[reportReturnType]


class _Products(torch.autograd.Function):
    """The weights' gradients are a side effect of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, rows: list[int]) -> Tensor:
        weights = _weights(layer)
        output = x.new_empty(x.shape[0], weights[0].shape[0])
        _multiply(weights, x, output, rows, layout="TN")
        ctx.save_for_backward(x)
        ctx.layer, ctx.rows = layer, rows
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from compiled.experts import add_weight_gradients  # Triton is not everywhere

        (x,), layer, rows, grad = ctx.saved_tensors, ctx.layer, ctx.rows, grad.contiguous()
        weights = _weights(layer)
        grad_x = torch.empty_like(x)
        _multiply(weights, grad, grad_x, rows, layout="NN", grad=True, use_split_accumulator=True)
        add_weight_gradients(x, grad, [weight.main_grad for weight in weights], rows)
        nothing = x.new_empty(()).expand(weights[0].shape)  # where communication overlaps, a hook asks for a gradient
        for weight in weights:
            weight.grad_added_to_main_grad = True
            weight.grad = nothing
        layer._trigger_wgrad_accumulation_and_reduce_hooks()
        return grad_x, None, None


def _weights(layer: Any) -> list[Any]:
    return list(layer._parameters.values())


def _multiply(weights: list[Tensor], x: Tensor, out: Tensor, rows: list[int], **how: Any) -> None:
    """Each expert's rows with its weight, by Transformer Engine."""
    from transformer_engine.pytorch.cpp_extensions import (  # pyright: ignore[reportMissingImports]
        general_grouped_gemm,
    )

    none = [None] * len(rows)
    general_grouped_gemm(weights, x.split(rows), [out], none, x.dtype, m_splits=rows, single_output=True, **how)
