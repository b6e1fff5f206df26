"""Layers of experts whose weights are no inputs of autograd, and whose numbers of tokens stay on the GPU.

Transformer Engine has a weight for each expert, and autograd a node for each weight: it is handed a gradient that
nobody reads, since the layer added the real one to `main_grad` itself, waits for the stream that the weight was wrapped
on, and calls the hook by which `DistributedDataParallel` learns that a gradient is there. Its products ask the
processor how many tokens each expert has, so that this waits for the GPU in every layer, and then the GPU for it.

Here a layer multiplies by torch's grouped product, which reads these numbers on the GPU. Its backward pass adds all of
its weights' gradients in one kernel (`compiled.experts`, where SwiGLU is from too), and calls the hooks itself. For
both its weights, and their `main_grad`, must lie side by side in memory, which they do if they are put in order before
they are wrapped:

    put_experts_in_order(model)
    wrapped = DistributedDataParallel(model.config, config, model)
    prepare_experts(wrapped)

Where all of a layer's tokens come from this rank, with megatron-core's `alltoall` dispatcher and the fused permutation,
the processor does not wait for the GPU at all then; where ranks send each other tokens, only for the numbers of these.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from bridge.model.renamed import with_names

ONE_KERNEL = (9, 10)  # major compute capabilities for which torch has a kernel for all experts


def put_experts_in_order(model: nn.Module) -> None:
    """`DistributedDataParallel` lays parameters out from the last to the first: so the first expert becomes the last.

    To be called before that. A layer then names its parameters in another order, and so does the optimizer. Checkpoints
    of megatron-core whose state has names (`fully_reshardable`, as `minimax-m2 train` writes them) do not depend on
    that. Those that follow its buffers (`dp_reshardable`) do, and nothing would say so: what was written without this
    call must be read without it, and the other way round.
    """
    for module in model.modules():
        layer: Any = module
        for expert in reversed(range(layer.num_gemms)) if _is_grouped(layer) else ():
            layer._parameters[f"weight{expert}"] = layer._parameters.pop(f"weight{expert}")


def prepare_experts(wrapped: DistributedDataParallel) -> bool:
    """Prepare the experts of every layer where that can be done, and say whether there is one.

    To be called on the stream on which `wrapped` was made. It takes a bfloat16 model with Transformer Engine's layers
    and `gradient_accumulation_fusion`, and `DistributedDataParallel` with `use_distributed_optimizer` and
    `grad_reduce_in_fp32`.
    """
    found = [module for module in wrapped.module.modules() if isinstance(module, MoELayer)]
    prepared = [moe for moe in found if _prepare(moe, wrapped)]
    return bool(prepared)


def _prepare(moe: Any, wrapped: DistributedDataParallel) -> bool:
    experts, dispatcher = moe.experts, moe.token_dispatcher
    if type(moe.experts) is not TEGroupedMLP or _computes_otherwise(experts.config):
        return False
    layers = [experts.linear_fc1, experts.linear_fc2]
    if not all(_can(layer) for layer in layers):
        return False
    stacks = [stack for layer in layers if (stack := _stacks(layer, wrapped)) is not None]
    if len(stacks) < len(layers):
        return False
    for layer, stack in zip(layers, stacks, strict=True):
        layer.forward = partial(_forward, stack)
    experts.forward = partial(_with_offsets, experts, _forward_of(experts.config))
    if type(moe.token_dispatcher) is MoEAlltoAllTokenDispatcher:
        dispatcher._maybe_dtoh_and_synchronize = partial(_leave_tokens_per_expert, dispatcher)
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

    def check(self) -> None:
        """Refuse what was wrapped once more, or given other memory, since.

        Raises:
            ValueError: the first parameter, or its float32 sum, is not where it was.
        """
        first = self.parameters[0]
        pairs = {"weight0": (first, self.weights), "weight0.main_grad": (first.main_grad, self.sums)}
        for name, (now, then) in pairs.items():
            if now.data_ptr() != then.data_ptr():
                raise ValueError(
                    f"{name} of experts of shape {tuple(first.shape)} is at {now.data_ptr():#x}, and was at "
                    f"{then.data_ptr():#x} when prepare_experts was called; call it after the model is wrapped for "
                    "the last time"
                )


def _stacks(layer: Any, wrapped: DistributedDataParallel) -> Stacks | None:
    """None where parameters do not lie side by side, as at the end of a bucket that is filled up."""
    parameters = _weights(layer)
    weights = _side_by_side([one.data for one in parameters])
    sums = _side_by_side([one.main_grad for one in parameters])
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

    Captured, a backward pass calls no hooks. And GPUs for which torch's product is not one kernel: then it asks the
    processor for numbers of tokens.
    """
    quantised = config.fp8 or config.fp4 or config.enable_autocast
    modules: Any = config.cuda_graph_modules  # a list, once the config is made
    captured = config.cuda_graph_impl != "none" and (not modules or CudaGraphModule.moe in modules)
    in_a_loop = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in ONE_KERNEL
    return bool(quantised or config.cpu_offloading or config.use_transformer_engine_op_fuser or captured or in_a_loop)


def _leave_tokens_per_expert(dispatcher: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
    """The dispatcher's sending of numbers to the processor, without those of the experts' tokens.

    It sends at one point and waits at another. Where it waits only "before_finish", nothing else was sent.
    """
    if not point == dispatcher.cuda_sync_point == "before_finish":
        MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize(dispatcher, point, None)
    return tokens_per_expert


class Offsets(NamedTuple):
    """Where each expert's tokens end, on their device, as `grouped_mm` wants it."""

    ends: Tensor

    def tolist(self) -> "Offsets":
        """megatron-core asks for a list, for which it would wait, and hands it on to the layers."""
        return self


def _with_offsets(
    experts: Any, forward: Callable[..., Any], x: Tensor, tokens_per_expert: Tensor, *arguments: Any, **named: Any
) -> Any:
    counts = tokens_per_expert.to(x.device, non_blocking=True)
    return forward(experts, x, Offsets(counts.cumsum(0, dtype=torch.int32)), *arguments, **named)


def _forward_of(config: TransformerConfig) -> Callable[..., Any]:
    """megatron-core's forward pass of a layer of experts, in which its fused SwiGLU is `swiglu`, where that can be."""
    if config.activation_func_fp8_input_store or config.moe_router_dtype == "fp64":
        return TEGroupedMLP.forward
    return with_names(TEGroupedMLP.forward, weighted_bias_swiglu_impl=_swiglu)


def _swiglu(x: Tensor, _bias: None, weights: Tensor, _in_fp8: bool) -> Tensor:
    return swiglu(x, weights)


def _forward(stack: Stacks, x: Tensor, m_splits: Offsets) -> tuple[Tensor, None]:
    """As megatron-core's layer: the output, and no bias."""
    stack.check()
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


# `compiled.experts` needs Triton, which is not everywhere where this file is read.
def add_gradients(x: Tensor, grad: Tensor, total: Tensor, ends: Tensor) -> None:
    from compiled.experts import add_weight_gradients

    add_weight_gradients(x, grad, total, ends)


def swiglu(x: Tensor, weights: Tensor) -> Tensor:
    from compiled.experts import weighted_swiglu

    return weighted_swiglu(x, weights)
