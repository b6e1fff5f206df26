"""CUDA graphs of attention and router by Transformer Engine: captured before the first step that is made.

So a run that goes on replays where the uninterrupted one does; an eager step may differ in the last bits.

What must be so for the capture: `DistributedDataParallel` is made on a stream of its own (`bridge.training.optimizer`),
the random states are Transformer Engine's, and megatron-core's microbatch calculator is set up.

Where parameters are gathered while the forward pass runs (`overlap_param_gather`), modules have hooks that wait for
theirs, and a module with hooks cannot be captured: they are taken off for the capture. A graph does not call the hooks
that are put back, so the layer itself calls those of its captured modules before it. On one GPU and at EP 2 that was
right; what it gains is not recorded, and `bridge.model.safe_settings` refuses the two together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from bridge.training.step import Trained


@contextmanager
def without_gather_hooks(wrapped: Sequence[DistributedDataParallel]) -> Iterator[bool]:
    """Inside, no module waits for its parameters; says whether any did. They stay as they are, gathered or not."""
    hooked = [chunk for chunk in wrapped if chunk.ddp_config.overlap_param_gather]
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=False)
    try:
        yield bool(hooked)
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()


class CudaGraphs:
    """Of a model that has made no step in this process; from `capture` to `delete` its steps are replays."""

    settings: ClassVar[dict[str, Any]] = {
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_modules": ["attn", "moe_router", "moe_preprocess"],
        "cuda_graph_warmup_steps": 0,
        "use_te_rng_tracker": True,
    }

    def __init__(self, trained: Trained):
        job, config = trained.job, trained.chunks[0].config
        rank, dp = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        unset_num_microbatches_calculator()  # another run in this process may have left one
        init_num_microbatches_calculator(rank, None, job.global_batch_size, job.micro_batch_size, dp)
        self._wrapped = trained.wrapped
        self._helper = TECudaGraphHelper(
            model=trained.wrapped,
            config=config,
            seq_length=job.seq_length,
            micro_batch_size=job.micro_batch_size,
            optimizers=[trained.optimizer],
        )

    def capture(self) -> None:
        """Call it once, before the first step."""
        # Replays read this tensor, and each step's scale, of one entry, is copied into it: megatron-core would make one
        # of no dimension in the capture.
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=torch.cuda.current_device()))
        with without_gather_hooks(self._wrapped) as hooked:
            self._helper.create_cudagraphs()
        if hooked:
            self._helper.cuda_graph_set_manual_hooks()

    def delete(self) -> None:
        """Give back the memory of the graphs, for a process that goes on with another model."""
        if self._helper.graphs_created():
            self._helper.delete_cuda_graphs()
