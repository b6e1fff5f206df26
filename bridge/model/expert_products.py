"""Layers of experts whose weights are no inputs of autograd, and whose numbers of tokens stay on the GPU.

Transformer Engine has a weight for each expert, and autograd a node for each weight: it is handed a gradient that
nobody reads, since the layer added the real one to `main_grad` itself, waits for the stream that the weight was wrapped
on, and calls the hook by which `DistributedDataParallel` learns that a gradient is there. Its products ask the
processor how many tokens each expert has, so that this waits for the GPU in every layer, and then the GPU for it.

Here a layer multiplies by torch's grouped product, which reads these numbers on the GPU. Its backward pass adds all of
its weights' gradients in one kernel (`compiled.experts`), and calls the hooks itself. For both its weights, and their
`main_grad`, must lie side by side in memory, which they do if they are put in order before they are wrapped:

    put_experts_in_order(model)
    wrapped = DistributedDataParallel(model.config, config, model)
    prepare_experts(wrapped)

Where all of a layer's tokens come from this rank, the processor does not wait for the GPU at all then; otherwise only
to send them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import grouped_mm


def put_experts_in_order(model: nn.Module) -> None:
    """`DistributedDataParallel` lays parameters out from the last to the first: so the first expert becomes the last.

    To be called before that. Only the order in which a layer names its parameters is another afterwards.
    """
    for module in model.modules():
        layer: Any = module
        for expert in reversed(range(layer.num_gemms)) if _is_grouped(layer) else ():
            layer._parameters[f"weight{expert}"] = layer._parameters.pop(f"weight{expert}")


def prepare_experts(wrapped: DistributedDataParallel) -> bool:
    """Prepare the experts of every layer where that can be done, and say whether there is one.

    To be called on the stream on which `wrapped` was made. Gradients must be added in float32 (`grad_reduce_in_fp32`).
    """
    found = [module for module in wrapped.module.modules() if isinstance(module, TEGroupedMLP)]
    prepared = [experts for experts in found if _prepare(experts, wrapped)]
    for module in wrapped.module.modules():
        dispatcher: Any = getattr(module, "token_dispatcher", None)
        if _is_alltoall(dispatcher) and module.experts in prepared:
            theirs: Any = dispatcher._maybe_dtoh_and_synchronize
            dispatcher._maybe_dtoh_and_synchronize = partial(_leave_counts, dispatcher, theirs)
    return bool(prepared)


def _prepare(experts: Any, wrapped: DistributedDataParallel) -> bool:
    layers = [experts.linear_fc1, experts.linear_fc2]
    if _computes_otherwise(experts.config) or not all(_can(layer) for layer in layers):
        return False
    stacks = [stack for layer in layers if (stack := _stacks(layer, wrapped)) is not None]
    if len(stacks) < len(layers):
        return False
    for layer, stack in zip(layers, stacks, strict=True):
        layer.forward = partial(_forward, stack)
    experts.forward = partial(_with_counts_on_gpu, experts.forward)
    return True


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


class Stacks(NamedTuple):
    """A layer's parameters; all of them, and their float32 sums, in a tensor each: `[experts, out, in]`."""

    parameters: list[Any]
    weights: Tensor
    sums: Tensor
    hooks: Hooks


def _stacks(layer: Any, wrapped: DistributedDataParallel) -> Stacks | None:
    """None where parameters do not lie side by side, as at the end of a bucket that is filled up."""
    parameters = _weights(layer)
    weights, sums = (
        _side_by_side([one.data for one in parameters]),
        _side_by_side([one.main_grad for one in parameters]),
    )
    if weights is None or sums is None:
        return None
    overlap = wrapped.ddp_config.overlap_grad_reduce  # or nobody waits for a gradient, and hooks have nothing to do
    hooks = [wrapped._make_backward_post_hook(weight) for weight in parameters] if overlap else []
    return Stacks(parameters, weights, sums, Hooks(hooks, torch.cuda.current_stream()))


def _side_by_side(tensors: list[Tensor]) -> Tensor | None:
    """One tensor of those that follow one another in memory; None if they do not."""
    first = tensors[0]
    places = [(one.untyped_storage().data_ptr(), one.storage_offset()) for one in tensors]
    storage, offset = places[0]
    if places != [(storage, offset + number * first.numel()) for number in range(len(tensors))]:
        return None
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()), offset)


def _is_alltoall(dispatcher: object) -> bool:
    return type(dispatcher) is MoEAlltoAllTokenDispatcher


def _is_grouped(module: Any) -> bool:
    return hasattr(module, "num_gemms") and hasattr(module, "te_quant_params")


def _can(layer: Any) -> bool:
    """Whether it is megatron-core's layer of experts in bfloat16, trained, that adds to `main_grad` itself."""
    if not (_is_grouped(layer) and getattr(layer, "fuse_wgrad_accumulation", False)):
        return False
    if layer.te_quant_params is not None or layer.delay_wgrad_compute or layer.use_bias:
        return False
    if len(layer._parameters) != layer.num_gemms:
        return False
    weights = _weights(layer)
    return (
        all(type(one) is nn.Parameter and one.requires_grad for one in weights)
        and all(one.main_grad.dtype == torch.float32 and one.dtype == torch.bfloat16 for one in weights)
        and all(size % 8 == 0 for size in weights[0].shape)
    )


def _computes_otherwise(config: TransformerConfig) -> bool:
    """Settings with which Transformer Engine's layer does more than multiply, or is not called, or captured in a graph.

    Captured, a backward pass calls no hooks.
    """
    quantised = config.fp8 or config.fp4 or config.enable_autocast
    modules: Any = config.cuda_graph_modules  # a list, once the config is made
    captured = config.cuda_graph_impl != "none" and (not modules or CudaGraphModule.moe in modules)
    return bool(quantised or config.cpu_offloading or config.use_transformer_engine_op_fuser or captured)


def _leave_counts(
    dispatcher: Any, theirs: Callable[..., object], point: str, tokens_per_expert: Tensor | None = None
) -> Tensor | None:
    """The dispatcher's sending of numbers to the processor, without those of the experts' tokens.

    If it would be waited for at "before_finish", these are all that is waited for.
    """
    if not point == dispatcher.cuda_sync_point == "before_finish":
        theirs(point, None)
    return tokens_per_expert


class Ends(NamedTuple):
    """Of each expert's tokens, on their device; megatron-core asks for a list, and hands it on to the layers."""

    ends: Tensor

    def tolist(self) -> "Ends":
        return self


def _with_counts_on_gpu(
    theirs: Callable[..., Any], x: Tensor, tokens_per_expert: Tensor, *arguments: Any, **named: Any
) -> Any:
    counts = tokens_per_expert.to(x.device, non_blocking=True)
    return theirs(x, Ends(counts.cumsum(0, dtype=torch.int32)), *arguments, **named)


def _forward(stack: Stacks, x: Tensor, m_splits: Ends) -> tuple[Tensor, None]:
    """As megatron-core's layer: the output, and no bias."""
    if torch.is_grad_enabled() and not x.requires_grad:  # all before it is frozen; the weights are not
        x = x.detach().requires_grad_()
    return _Products.apply(x.contiguous(), stack, m_splits.ends), None  # pyright: ignore[reportReturnType]


class _Products(torch.autograd.Function):
    """The weights' gradients are a side effect of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Stacks, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, ends)
        ctx.stack = stack
        return grouped_mm(x, stack.weights.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, ends), stack, grad = ctx.saved_tensors, ctx.stack, grad.contiguous()
        grad_x = grouped_mm(grad, stack.weights, offs=ends)
        add_gradients(x, grad, stack.sums, ends)
        stack.hooks.call(stack.parameters)
        return grad_x, None, None


def _weights(layer: Any) -> list[Any]:
    return [getattr(layer, f"weight{expert}") for expert in range(layer.num_gemms)]


def add_gradients(x: Tensor, grad: Tensor, total: Tensor, ends: Tensor) -> None:
    """`compiled.experts`, which needs Triton; that is not everywhere where this file is read."""
    from compiled.experts import add_weight_gradients

    add_weight_gradients(x, grad, total, ends)
