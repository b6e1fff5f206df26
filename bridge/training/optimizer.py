"""megatron-core's distributed data parallelism, optimizer and schedule around a model, on a GPU and without one.

Gradients are summed and kept in float32; the optimizer's weights and state are divided over the data-parallel ranks.
On GPUs that share gradients with others communication overlaps with the backward pass and, where that is not refused
(CUDA graphs), the forward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from bridge.model.expert_products import prepare_experts, put_experts_in_order
from bridge.model.fused_optimizer import FusedOptimizer
from bridge.model.layer_spec import default_backend
from bridge.model.safe_settings import REFUSALS, check_settings
from bridge.training.checks import is_frozen
from bridge.training.settings import TrainJob


def freeze(chunks: Sequence[nn.Module], patterns: tuple[str, ...]) -> None:
    """Parameters whose name fits a pattern are not trained: `bridge.training.checks` has looked at the patterns."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(not is_frozen(name, patterns))


def ddp_config(model: TransformerConfig, *, overlap: bool) -> DistributedDataParallelConfig:
    """Float32 sums and the distributed optimizer; `overlap` of its communication, but for gathering that is refused."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    of_gathering = [refusal for refusal in REFUSALS.values() if "overlap_param_gather" in refusal.ddp]
    if any(refusal.found(model, config) for refusal in of_gathering):
        config.overlap_param_gather = False
    return config


def wrap(chunks: Sequence[Any]) -> list[DistributedDataParallel]:
    """Each chunk in megatron-core's `DistributedDataParallel`.

    On a GPU it is made on a stream of its own: CUDA graphs of the backward pass cannot be captured otherwise. Chunks
    after the first have one bucket, as in Megatron-LM: what they send overlaps anyway. Not by gloo, which gathers
    bfloat16 weights and a float32 router in one call wrongly, and says nothing.

    Raises:
        ValueError: settings that do not work together for this model (`bridge.model.safe_settings`).
    """
    gpu = torch.cuda.is_available()
    dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    shared = max(dense, parallel_state.get_expert_data_parallel_world_size()) > 1
    config = ddp_config(chunks[0].config, overlap=gpu and shared)
    for chunk in chunks:
        check_settings(chunk.config, config)
        put_experts_in_order(chunk)
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrapped = [
            DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=gpu and number > 0)
            for number, chunk in enumerate(chunks)
        ]
        for chunk in wrapped:
            prepare_experts(chunk)
    torch.cuda.current_stream().wait_stream(stream)
    return wrapped


def gather_parameters(wrapped: Sequence[DistributedDataParallel]) -> None:
    """After a step: every rank has all of its parameters anew, not only the part that its optimizer moved.

    Where gathering them overlaps with the forward pass, megatron-core leaves it to the next one.
    """
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(job: TrainJob, wrapped: list[DistributedDataParallel]) -> Any:
    """megatron-core's distributed optimizer: Adam with decoupled weight decay, none of it for norms.

    With Transformer Engine on a GPU its step is one kernel (`bridge.model.fused_optimizer`).
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=job.lr,
        min_lr=job.min_lr,
        weight_decay=job.weight_decay,
        adam_beta1=job.beta1,
        adam_beta2=job.beta2,
        adam_eps=job.epsilon,
        clip_grad=job.clip_grad,
        bf16=job.dtype == "bf16",
        params_dtype=torch.bfloat16 if job.dtype == "bf16" else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=wrapped[0].ddp_config.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(config)
    return with_fused_step(get_megatron_optimizer(config, wrapped, overrides))  # pyright: ignore[reportArgumentType]


def with_fused_step(optimizer: ChainedOptimizer) -> ChainedOptimizer:
    """The same with a step of one kernel, where there are Transformer Engine and a GPU."""
    return FusedOptimizer(optimizer) if default_backend() == "transformer_engine" else optimizer


def build_scheduler(job: TrainJob, optimizer: Any) -> OptimizerParamScheduler:
    """The learning rate of each step, counted in steps; weight decay is constant."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=job.lr,
        min_lr=job.min_lr,
        lr_warmup_steps=job.warmup_steps,
        lr_decay_steps=job.steps,
        lr_decay_style=job.schedule,
        start_wd=job.weight_decay,
        end_wd=job.weight_decay,
        wd_incr_steps=job.steps,
        wd_incr_style="constant",
    )
