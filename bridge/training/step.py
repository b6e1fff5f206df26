"""One optimizer step: megatron-core's pipeline schedule, its gradient finalisation, its optimizer.

The loss is the mean over the tokens of the global batch that are trained on, whatever microbatch or rank they are in
(`calculate_per_token_loss`), so that it and its gradient are those of one process at any layout. Their number is known
before the step, and each microbatch's loss is divided by it; megatron-core would count it on the way, and then read and
write all gradients once more.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch
from weakref import WeakMethod

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor, nn

from bridge.model.context_parallel import own_part
from bridge.model.fused_optimizer import FusedOptimizer
from bridge.model.router_losses import forget_router_losses
from bridge.training.settings import TrainJob

AUX_LOSS = "load_balancing_loss"


class Flags(NamedTuple):
    """What a rank has to tell the others, sent with the losses of a step; after it, on how many ranks it is so."""

    failed: int  # an error is kept
    writing: int  # a checkpoint is being written
    stopping: int = 0  # it was asked to stop


class StepResult(NamedTuple):
    """What a step was: mean loss, norm of the gradient before it was clipped, learning rate, tokens trained on.

    `aux_loss` is the load-balancing loss without its coefficient, mean over layers; `expert_load` the most tokens that
    one expert got over the mean of its layer, in the worst layer; `flags` what the ranks had to tell each other.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    aux_loss: float
    expert_load: float
    flags: Flags


class NotFinite(NamedTuple):
    """A step that was not made: "loss" or "gradient" is not finite."""

    what: str


@dataclass
class Trained:
    """What is trained on this rank: the model's chunks, the same wrapped, and what moves them."""

    job: TrainJob
    chunks: list[Any]
    wrapped: list[Any]
    optimizer: Any
    scheduler: Any
    load: Tensor | None = None  # tokens of each layer and expert here, of the step that is being made
    routers: list[Any] = field(init=False)  # those that have a bias, and so count their tokens

    def __post_init__(self) -> None:
        modules = (module for chunk in self.chunks for module in chunk.modules())
        self.routers = [module for module in modules if getattr(module, "expert_bias", None) is not None]
        # Another loop in this process may have left a scale of another shape, and losses of another number of layers.
        forget_router_losses()
        config = self.chunks[0].config
        # Python does not collect an optimizer that its model refers to: each run would keep its memory and groups.
        config.finalize_model_grads_func = _weakly(self._finalize)
        config.grad_scale_func = _weakly(self.optimizer.scale_loss)
        ddp = self.wrapped[0].ddp_config
        if ddp.overlap_grad_reduce:
            alone = len(self.wrapped) == 1
            config.no_sync_func = self.wrapped[0].no_sync if alone else [one.no_sync for one in self.wrapped]
            starts = [one.start_grad_sync for one in self.wrapped]
            config.grad_sync_func = None if alone else starts
        if ddp.overlap_param_gather and len(self.wrapped) > 1:
            config.param_sync_func = [one.start_param_sync for one in self.wrapped]

    def _finalize(self, model: list[Any], num_tokens: object = None, **named: Any) -> None:
        counts = [router.local_tokens_per_expert.clone() for router in self.routers]
        self.load = torch.stack(counts) if counts else None
        finalize_model_grads(model, None, **named)  # the losses were divided
        for chunk in self.chunks:
            _drop_graphs(chunk)


def _drop_graphs(chunk: nn.Module) -> None:
    """Of the last microbatch's autograd graph: megatron-core's dispatchers keep a tensor that has it.

    The graph has the hooks of `DistributedDataParallel`, and so the model with its dispatchers, in a circle that Python
    does not see and never collects.
    """
    for module in chunk.modules():
        dispatcher = getattr(module, "token_dispatcher", None)
        for name, value in list(vars(dispatcher).items()) if dispatcher is not None else ():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(dispatcher, name, value.detach())


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method, for as long as something else has its object."""
    found = WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        alive = found()
        assert alive is not None, "what is trained is gone"
        return alive(*args, **kwargs)

    return call


def forward(
    trained: Trained,
    batches: list[Iterator[dict[str, Tensor]]],
    *,
    flags: Flags = Flags(0, 0),  # noqa: B008  # it is immutable
    forward_only: bool = False,
) -> Tensor:
    """The schedule over a step's microbatches: the sum of the losses, the tokens trained on, the flags, of all ranks.

    `batches` has an iterator for each chunk.
    """
    job = trained.job
    dp = parallel_state.get_data_parallel_world_size()
    alone = len(trained.wrapped) == 1
    microbatches = [list(of_chunk) for of_chunk in batches]
    trained_on, all_tokens = _tokens_of_all_ranks(microbatches[0])
    # The load-balancing loss is over all tokens, and megatron-core multiplies it by their number.
    trained.chunks[0].config.moe_grad_scale_func = all_tokens.reciprocal
    iterators = [iter(of_chunk) for of_chunk in microbatches]
    found = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, trained_on),
        data_iterator=iterators[0] if alone else iterators,  # pyright: ignore[reportArgumentType]
        model=trained.wrapped[0] if alone else trained.wrapped,
        num_microbatches=job.global_batch_size // (job.micro_batch_size * dp),
        seq_length=job.seq_length,
        micro_batch_size=job.micro_batch_size,
        forward_only=forward_only,
    )
    # Tensor-parallel ranks have the same losses, ranks of other stages none.
    counts = parallel_state.get_tensor_model_parallel_rank() == 0
    sums = _sent([0, 0, *flags])
    for one in found if counts else ():
        sums[:2] += one["sums"]
    torch.distributed.all_reduce(sums)
    return sums


def _tokens_of_all_ranks(microbatches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of the global batch: the tokens that are trained on (or 1, if there are none), and all; of one entry each."""
    masks = [batch["loss_mask"] for batch in microbatches]
    sums = _sent([float(sum(mask.sum() for mask in masks)), float(sum(mask.numel() for mask in masks))])
    group: Any = parallel_state.get_data_parallel_group()
    torch.distributed.all_reduce(sums, group=group)
    return sums[:1].clamp(min=1).float(), sums[1:].float()


def _sent(values: Sequence[float]) -> Tensor:
    """On the GPU, without waiting for what it is at."""
    return torch.tensor(values, dtype=torch.float64).to(torch.cuda.current_device(), non_blocking=True)


def train_step(
    trained: Trained,
    batches: list[Iterator[dict[str, Tensor]]],
    flags: Flags = Flags(0, 0),  # noqa: B008  # it is immutable
) -> StepResult | NotFinite:
    """One step; where the loss or the gradient is not finite, nothing is changed. `flags` are this rank's.

    Beside megatron-core's own waits, the experts' dispatcher's, the host waits for the GPU twice: for the norm of the
    gradient, when the update is on its way if it is one kernel, and at the end for all that is reported.
    """
    for chunk in trained.wrapped:  # the longest for the GPU, which waits for something to do
        chunk.zero_grad_buffer()
    biases = [(router.expert_bias, router.expert_bias.clone()) for router in trained.routers]
    sums = forward(trained, batches, flags=flags)
    aux_loss = _aux_loss(trained)
    grad_norm = _move(trained.optimizer, sums)
    if isinstance(grad_norm, NotFinite):
        for bias, before in biases:  # megatron-core moves it when gradients are final
            bias.copy_(before)
        return grad_norm
    trained.optimizer.zero_grad()  # while the GPU is at work
    lr = trained.optimizer.param_groups[0]["lr"]
    trained.scheduler.step(1)
    found = torch.cat([aux_loss, _expert_load(trained).double(), sums]).tolist()
    aux, load, total, tokens, *raised = found
    return StepResult(total / max(tokens, 1), grad_norm, lr, int(tokens), aux, load, Flags(*map(int, raised)))


class _NotFiniteError(ArithmeticError):
    """The loss or the norm of the gradient; its argument says which."""


def _move(optimizer: Any, sums: Tensor) -> float | NotFinite:
    """The optimizer's step, and the norm of the gradient; no step, if that or the loss, first of `sums`, is not finite.

    megatron-core's own optimizer has no such check. It asks for the norm, clips the gradients with it, and then changes
    the weights. The processor waits for the numbers before the last of these: clipping keeps the GPU at work until the
    rest is on its way. By a norm that is not finite nothing is clipped, so that one can look for where it began.
    """
    if isinstance(optimizer, FusedOptimizer):
        made, found, _ = optimizer.step(sums[0])
        return found if made else NotFinite("gradient" if sums[0].isfinite() else "loss")
    asked: list[tuple[Tensor, Any]] = []

    def norm_to_clip_by() -> Any:
        norm = type(optimizer).get_grad_norm(optimizer)  # on the GPU, where megatron-core leaves it there
        one = torch.as_tensor(norm, device=sums.device)
        both = torch.stack([sums[0], one.to(sums.dtype).reshape(())]).to("cpu", non_blocking=True)
        asked.append((both, torch.cuda.current_stream().record_event()))
        finite = one.where(one.isfinite(), 0)
        return finite if isinstance(norm, Tensor) else finite.item()

    def step_if_finite() -> Any:
        for what, value in zip(("loss", "gradient"), _arrived(*asked[-1]), strict=True):
            if not math.isfinite(value):
                raise _NotFiniteError(what)
        return _update(optimizer)

    with patch.multiple(optimizer, get_grad_norm=norm_to_clip_by, step_with_ready_grads=step_if_finite):
        try:
            optimizer.step()
        except _NotFiniteError as error:
            return NotFinite(str(error))
    return _arrived(*asked[-1])[1]


def _update(optimizer: Any) -> Any:
    """megatron-core's update by a chain of optimizers, of which each gathers the weights of all; only the last must.

    The experts' first: it is the longest on the GPU, and the processor prepares the others meanwhile.
    """
    parts = optimizer.chained_optimizers[::-1]
    with ExitStack() as stack:
        stack.enter_context(patch.object(optimizer, "chained_optimizers", parts))
        for part in parts[:-1]:
            stack.enter_context(patch.object(part, "_defer_param_sync", True, create=True))
        return type(optimizer).step_with_ready_grads(optimizer)


def _arrived(values: Tensor, event: Any) -> list[float]:
    """Numbers that were sent to the processor before an event."""
    event.synchronize()
    return values.tolist()


def _forward_step(trained_on: Tensor, batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    device = torch.cuda.current_device()
    batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
    positions = torch.arange(batch["tokens"].shape[1], device=device).expand_as(batch["tokens"])
    batch["position_ids"] = positions
    batch = {name: own_part(value) for name, value in batch.items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    mask = batch["loss_mask"]

    def loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, tokens = (losses.float() * mask).sum(), mask.sum()
        sums = torch.stack([total.detach().double(), tokens.double()])
        return total / trained_on[0], tokens.int(), {"sums": sums}

    return output, loss


def _aux_loss(trained: Trained) -> Tensor:
    """Mean over layers and microbatches, on all ranks; of one entry."""
    job, tracker = trained.job, get_moe_metrics_tracker()
    entry = tracker.metrics.get(AUX_LOSS)
    layers = trained.chunks[0].config.num_layers
    device = torch.cuda.current_device()
    values = torch.zeros(layers, device=device) if entry is None else entry.values.to(device).clone()
    tracker.clear()  # and kept: CUDA graphs add to the tensor that was there when they were captured
    if entry is not None and entry.reduce_group is not None:
        torch.distributed.all_reduce(values, group=entry.reduce_group)
    # Each tensor- and context-parallel rank has the same now, each data-parallel rank its own sequences.
    same = parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
    torch.distributed.all_reduce(values)
    experts = layers // 2 if trained.job.model_class == "hybrid" else layers
    return values.sum(0, keepdim=True).double() * (job.micro_batch_size / (same * job.global_batch_size * experts))


def _expert_load(trained: Trained) -> Tensor:
    """The fullest expert's tokens over the mean of its layer, in the worst layer of all ranks; of one entry."""
    worst = torch.zeros(1, device=torch.cuda.current_device())
    if trained.load is not None:
        group: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        load = trained.load.float().to(worst.device)
        torch.distributed.all_reduce(load, group=group)
        worst[0] = (load.amax(1) / load.mean(1).clamp(min=1e-9)).max()
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    return worst
