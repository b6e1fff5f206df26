"""`bridge.jobs.rank_pool` for tests, whose ranks start in milliseconds.

Without a GPU they are forks (`support.forks`). CUDA does not survive a fork: where there is one, each rank is a fresh
process. gloo's ranks are the processor's on every host, and see no GPU.
"""

from multiprocessing.context import BaseContext
from typing import Any

import torch

from bridge.jobs import rank_pool
from bridge.jobs.rank_pool import RankError
from support import forks

__all__ = ["RankError", "RankPool"]


class RankPool(rank_pool.RankPool):
    """Ranks that are forks where they may be."""

    def __init__(self, world: int, backend: str = "gloo", **named: Any):
        super().__init__(world, backend, **named)
        if backend == "gloo":
            self.environment = {"CUDA_VISIBLE_DEVICES": ""} | self.environment

    def context(self) -> BaseContext:
        if torch.cuda.is_available():
            return super().context()
        forks.start_server()
        return forks.context
