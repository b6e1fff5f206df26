"""A step of training with megatron-core: its schedule, its gradients' completion, its gradient norm, on one rank."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from bridge.model.context_parallel import own_part

TRAINING_SETTINGS: dict[str, Any] = {
    "moe_aux_loss_coeff": 0.0,
    "moe_router_bias_update_rate": 0.0,
    "finalize_model_grads_func": partial(finalize_model_grads, force_all_reduce=True),
}


def wrapped(chunks: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """The chunks; gradients are reduced over data-parallel ranks in float32, into each parameter's `main_grad`."""
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    config: Any = chunks[0].config
    return [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


ForwardStep = Callable[[Iterator[Any], nn.Module], tuple[Tensor, Callable[..., Any]]]
"""megatron-core's: (microbatches, chunk) -> the chunk's output, and what makes a loss of the last chunk's."""


def forward_backward(
    ddp: Sequence[nn.Module], microbatches: Sequence[Any], forward_step: ForwardStep, *, seq: int, batch: int
) -> float | None:
    """Gradients of the mean loss over this rank's microbatches; the loss, or None where it is on another rank."""
    for chunk in ddp:
        chunk.zero_grad_buffer()  # pyright: ignore[reportCallIssue]  # nn.Module's attributes are declared as modules
    run: Callable[..., Any] = get_forward_backward_func()
    reduced = run(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in ddp] if len(ddp) > 1 else iter(microbatches),
        model=list(ddp),
        num_microbatches=len(microbatches),
        seq_length=seq,
        micro_batch_size=batch,
    )
    return float(sum(step["loss"] for step in reduced)) / len(microbatches) if reduced else None


def labelled_step(batches: Iterator[tuple[Tensor, Tensor]], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    """The mean cross entropy of (tokens, labels), each [batch, seq]; of this rank's part under context parallelism."""
    tokens, labels = next(batches)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    share = 1 / parallel_state.get_context_parallel_world_size()  # the schedule multiplies by the size
    tokens, labels, positions = (own_part(whole).contiguous() for whole in (tokens, labels, positions))
    output = model(tokens, positions, None, labels=labels)
    return output, lambda losses: (losses.mean() * share, {"loss": losses.mean().detach()})


@torch.no_grad()
def descend(chunks: Sequence[nn.Module], rate: float) -> None:
    """A step of plain gradient descent, by each rank for itself."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter -= rate * parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]


def gradient_norm(chunks: Sequence[nn.Module]) -> float:
    """megatron-core's own: each parameter once, dense and expert parameters over their own groups."""
    groups = {
        True: parallel_state.get_model_parallel_group(),
        False: parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    }
    tp, etp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
    norms = []
    for dense, group in groups.items():
        counted: list[Any] = [
            parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]
            for chunk in chunks
            for parameter in chunk.parameters()
            if parameter.requires_grad
            and getattr(parameter, "allreduce", True) is dense
            and param_is_not_tensor_parallel_duplicate(parameter, tp, etp)
        ]
        total = get_grad_norm_fp32(counted, grad_stats_parallel_group=group)  # pyright: ignore[reportArgumentType]
        norms.append(float(total))
    return (norms[0] ** 2 + norms[1] ** 2) ** 0.5
