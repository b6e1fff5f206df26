"""Ranks that start in milliseconds: forks of one process that has imported what is slow to import."""

from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from typing import Any

import torch
from torch.multiprocessing import start_processes

SLOW_IMPORTS = [
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "transformers.models.minimax_m2.modeling_minimax_m2",
    "compiled.norm.modules",
    "bridge.minimax_m2_bridge",
    "bridge.proof.roundtrip",
]


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """`function(rank, *arguments)` on every rank; raises what one of them raises.

    CUDA does not survive a fork: where there is a GPU, each rank is a fresh process.
    """
    set_forkserver_preload(SLOW_IMPORTS)
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    start_processes(function, arguments, nprocs=world, start_method=method)
