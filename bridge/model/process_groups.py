"""torch.distributed and megatron-core's process groups, for as long as a `with` block lasts.

megatron-core modules look up their process groups when they are built, even in a program of one process. A conversion
or a test enters `model_parallel()`; under torchrun the same line joins the ranks that torchrun started; inside a
trainer, which has set up everything already, it does nothing. On exit only what was set up here is taken down.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore

from bridge.jobs.ranks import TorchrunRanks
from bridge.model.cpu import megatron_on_cpu
from bridge.model.router_losses import forget_router_losses
from reference.parallelism import Parallelism

# TransformerConfig field: its name in `group_sizes`
PARALLEL_FIELDS = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
}


@contextmanager
def model_parallel(*, seed: int = 1234, **sizes: Any) -> Iterator[None]:
    """Process groups and random states for megatron-core; without a GPU also `megatron_on_cpu()`.

    Where the process groups are made here, `forget_router_losses` comes before and after.

    Args:
        seed: for megatron-core's CUDA random states; torch's CPU generator is left alone.
        sizes: for `megatron.core.parallel_state.initialize_model_parallel`, such as `pipeline_model_parallel_size=2`.

    Raises:
        ValueError: `sizes` are given, but megatron-core's process groups exist already.
    """
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(megatron_on_cpu())
        stack.enter_context(joined_ranks())
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(**sizes)
            stack.callback(parallel_state.destroy_model_parallel)
            forget_router_losses()  # of loops outside; and those inside leave none
            stack.callback(forget_router_losses)
            # A cache of the class, which keeps modules, and by hooks on them all that `DistributedDataParallel` wraps.
            stack.callback(RotaryEmbedding.forward.cache_clear)
        elif sizes:
            raise ValueError(
                f"megatron-core's process groups exist already, so {sizes} cannot take effect: leave the sizes out to "
                "use the groups as they are, or call megatron.core.parallel_state.destroy_model_parallel() first"
            )
        if not _random_states().is_initialized():
            model_parallel_cuda_manual_seed(seed)
            stack.callback(lambda: _random_states().reset())  # inside, others may have taken their place
        yield


def _random_states() -> Any:
    """megatron-core's tracker of CUDA random states, as it is now."""
    return get_cuda_rng_tracker()


@contextmanager
def joined_ranks() -> Iterator[None]:
    """torch.distributed's group of all ranks, before megatron-core's: torchrun's, or else a world of one.

    Of one it needs no network port. Where there is a group already, nothing is done.
    """
    with TorchrunRanks(models=True):
        if torch.distributed.is_initialized():
            yield
            return
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def groups_of(layout: Parallelism, *, seed: int = 1234) -> AbstractContextManager[None]:
    """`model_parallel` at a layout's sizes."""
    return model_parallel(
        seed=seed,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        context_parallel_size=layout.cp,
    )


def check_group_sizes(config: Any) -> None:
    """Refuse a `TransformerConfig` whose parallel sizes are not those of megatron-core's process groups.

    megatron-core reads now the one and now the other: whether gradients of experts are averaged over other ranks is in
    the config.

    Raises:
        ValueError: names the field, its value, and the size of the groups.
    """
    sizes = group_sizes(chunks=1)
    for field, name in PARALLEL_FIELDS.items():
        found, expected = getattr(config, field), sizes[name]
        if found != expected:
            raise ValueError(
                f"{field}={found}: megatron-core's process groups have the size {expected}, and gradients would be "
                f"added up over the wrong ranks; set {field}={expected}"
            )


def group_sizes(chunks: int) -> dict[str, int]:
    """The sizes of megatron-core's process groups, as `Parallelism` names them; a rank has so many chunks."""
    sizes: dict[str, Any] = {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": chunks,
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }
    return sizes
