"""megatron-core on a host without a GPU.

megatron-core asks `torch.cuda` for its device, its streams and its random state even where every tensor is on the CPU.
Inside `megatron_on_cpu()` these questions have CPU answers: the current device is the CPU, streams and events do
nothing (CPU work is done when the call returns), and there is one random state, torch's own. Arithmetic is untouched.
megatron-core's optimizers take only tensors whose type is said to be CUDA's: inside, every tensor says so.

The table below is all that is replaced, and only inside the context. With CUDA present the context refuses to start.
Build the model's config with `bridge.model.config.CPU_OVERRIDES` as well. What stays out of reach: the `alltoall`
dispatcher where tensor parallelism cuts experts, and Transformer Engine modules.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from inspect import unwrap
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import optimizer as optimizers
from megatron.core import utils as core_utils
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.hybrid import hybrid_block
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random
from megatron.core.transformer import utils
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.router import TopKRouter

CPU = torch.device("cpu")


class _Inert:
    """A stream or an event whose every method does nothing; an event is what a stream is asked to record."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *_: Any) -> "_Inert":
        return _Inert()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _no_operation()


class _TorchOnCPU:
    """`torch` for a module that writes `device="cuda"` out or pins memory: these factories read it as the CPU's own."""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch, name)
        if name not in ("zeros", "ones", "tensor"):
            return attribute
        return lambda *size, device=None, pin_memory=False, **kwargs: attribute(
            *size, device=CPU if device == "cuda" else device, **kwargs
        )


def _no_operation() -> Callable[..., None]:
    """A function that does nothing; another one at each call, because torch.compile tells torch's functions apart."""
    return lambda *args, **kwargs: None


def _type_as_on_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type`: asked for its type a tensor says "torch.cuda.FloatTensor", asked to change it does."""
    found = _TYPE(tensor, *args, **kwargs)
    return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found


def _numbers(tensor: Any, as_numpy: bool) -> Any:
    """What the dispatcher fetches from the GPU; megatron-core leaves a tensor that is on the CPU as it is."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


_TYPE = torch.Tensor.type
# (owner, attribute, what stands there inside the context)
_REPLACEMENTS: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "current_device", lambda: CPU),
    (torch.cuda, "Stream", _Inert),
    (torch.cuda, "Event", _Inert),
    (torch.cuda, "current_stream", lambda *args: _Inert()),
    (torch.cuda, "stream", lambda *args: nullcontext()),
    (torch.cuda, "synchronize", _no_operation()),
    (torch.Tensor, "record_stream", _no_operation()),
    (torch.Tensor, "type", _type_as_on_cuda),
    (torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor),
    (torch.cuda, "manual_seed", _no_operation()),
    (torch.cuda, "get_rng_state", lambda *args: torch.get_rng_state()),
    (random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    (random, "_set_cuda_rng_state", _no_operation()),
    (random.CudaRNGStatesTracker, "fork", lambda *args: nullcontext()),
    (token_dispatcher, "maybe_move_tensor_to_cpu", lambda tensor, *, as_numpy=False, **_: _numbers(tensor, as_numpy)),
    (TopKRouter, "_apply_expert_bias", unwrap(TopKRouter._apply_expert_bias)),  # one line, compiled for 20 seconds
    (schedules, "torch", _TorchOnCPU()),  # the token counter
    (clip_grads, "torch", _TorchOnCPU()),  # the gradient norm
    (optimizer, "torch", _TorchOnCPU()),  # the loss scale
    (core_utils, "torch", _TorchOnCPU()),  # the gradient norm
    (utils, "torch", _TorchOnCPU()),  # the causal mask
    (rope_utils, "torch", _TorchOnCPU()),  # the angles of a context-parallel rank
    (hybrid_block, "torch", _TorchOnCPU()),  # the positions of `flash_decode`
)

# Adam, clipping and the gradient norm where Transformer Engine or APEX is installed, whose kernels need a GPU: what
# megatron-core has without them.
if not optimizers.USING_PYTORCH_OPTIMIZER:
    _REPLACEMENTS += (
        (optimizers, "USING_PYTORCH_OPTIMIZER", True),
        (distrib_optimizer, "HAVE_APEX_OR_TE", False),  # whose state has no count of steps of each parameter
        (optimizer, "multi_tensor_applier", core_utils.local_multi_tensor_applier),
        (optimizer, "multi_tensor_scale_impl", core_utils.local_multi_tensor_scale),
        (clip_grads, "multi_tensor_applier", core_utils.local_multi_tensor_applier),
        (clip_grads, "multi_tensor_scale_impl", core_utils.local_multi_tensor_scale),
        (clip_grads, "multi_tensor_scale_tensor_impl", None),
        (clip_grads, "l2_norm_impl", core_utils.local_multi_tensor_l2_norm),
    )


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Run megatron-core without a GPU: inside, `torch.cuda` answers for the CPU. Contexts may be nested.

    Raises:
        RuntimeError: CUDA is available.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "megatron_on_cpu() is for hosts without a GPU, but torch.cuda.is_available() is True: run without the "
            "context, or hide the GPUs with CUDA_VISIBLE_DEVICES='' before Python starts"
        )
    with ExitStack() as stack:
        for owner, attribute, replacement in _REPLACEMENTS:
            stack.enter_context(patch.object(owner, attribute, replacement))
        yield
