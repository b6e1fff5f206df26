"""Which tokens of a sequence a context-parallel rank has: the split that megatron-core's attention and rotation expect.

Of twice as many pieces as there are ranks, rank r has the r-th from each end, so that all ranks have as much causal
attention to compute. Source: megatron-core utils: get_batch_on_this_cp_rank (which wants a GPU).
"""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed


def own_part(whole: Tensor) -> Tensor:
    """This rank's part of [batch, seq, ...]; all of it without context parallelism.

    Raises:
        ValueError: the sequence does not divide.
    """
    ranks, rank = _sizes()
    if ranks == 1:
        return whole
    if whole.shape[1] % (2 * ranks):
        raise ValueError(f"{whole.shape[1]} tokens do not divide into two pieces for each of cp = {ranks} ranks")
    pieces = whole.chunk(2 * ranks, 1)
    return torch.cat((pieces[rank], pieces[-1 - rank]), 1)


def whole_sequence(part: Tensor) -> Tensor:
    """What `own_part` took apart, on every rank; no gradient flows through it."""
    ranks, _ = _sizes()
    if ranks == 1:
        return part
    group: Any = parallel_state.get_context_parallel_group()
    parts = [torch.empty_like(part) for _ in range(ranks)]
    distributed.all_gather(parts, part.detach().contiguous(), group=group)
    halves = [piece.chunk(2, 1) for piece in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], 1)


def _sizes() -> tuple[int, int]:
    return parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
