"""CUDA graphs of attention and router by Transformer Engine: captured after some eager steps.

What must be so for the capture: `DistributedDataParallel` is made on a stream of its own (`bridge.training.optimizer`),
the random states are Transformer Engine's, and megatron-core's microbatch calculator is set up.
"""

from typing import Any, ClassVar

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

from bridge.training.step import Trained

EAGER_STEPS = 3


class CudaGraphs:
    """Captures before the step after `EAGER_STEPS`."""

    settings: ClassVar[dict[str, Any]] = {
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_modules": ["attn", "moe_router", "moe_preprocess"],
        "use_te_rng_tracker": True,
    }

    def __init__(self, trained: Trained):
        job, config = trained.job, trained.chunks[0].config
        rank, dp = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        init_num_microbatches_calculator(rank, None, job.global_batch_size, job.micro_batch_size, dp)
        self._helper = TECudaGraphHelper(
            model=trained.wrapped,
            config=config,
            seq_length=job.seq_length,
            micro_batch_size=job.micro_batch_size,
            optimizers=[trained.optimizer],
        )

    def before(self, step: int) -> None:
        """Call it before each step that is made here, counted from 1."""
        if step == EAGER_STEPS + 1:
            self._helper.create_cudagraphs()
