"""A step of several microbatches around megatron-core's `DistributedDataParallel`, without an optimizer."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

KEPT: dict[str, Any] = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True}


def accumulate(wrapped: DistributedDataParallel, microbatches: Sequence[Tensor]) -> Tensor:
    """The last output. Gradients of all outputs' sums are in `main_grad`, summed over microbatches and ranks."""
    wrapped.zero_grad_buffer()
    for number, microbatch in enumerate(microbatches, start=1):
        with wrapped.no_sync() if number < len(microbatches) else nullcontext():
            output = wrapped(microbatch)
            output.sum().backward()
    wrapped.finish_grad_sync()
    return output
