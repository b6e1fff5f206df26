"""What the norms need of a process group: its size, this process's rank in it, and a sum over its ranks."""

from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import (
    _resolve_process_group,  # pyright: ignore[reportPrivateImportUsage]  # torch's own modules take it from here
)

from compiled.tracing import is_traced

GroupGetter = Callable[[], ProcessGroup | None]


class ProcessGroupInfo(NamedTuple):
    """A process group as plain values, which `torch.compile` treats as constants."""

    name: str
    rank: int
    size: int


def process_group_info(group: ProcessGroup | None) -> ProcessGroupInfo:
    """Of a process group; None stands for a single process."""
    if group is None:
        return ProcessGroupInfo(name="", rank=0, size=1)
    return ProcessGroupInfo(name=group.group_name, rank=group.rank(), size=group.size())


def sum_over_ranks(x: Tensor, ranks: ProcessGroupInfo) -> Tensor:
    """The sum of `x` over the ranks. It may overwrite `x`: the caller must not use `x` again.

    Traced, it is a functional collective: torch 2.11 compiles in-place ones wrongly, and those have no kernel for fake
    tensors and the meta device. In eager mode it is an in-place one: a functional one takes about ten times as much
    processor time.
    """
    # torch declares names of groups as a NewType of str.
    if is_traced(x):
        total = functional.all_reduce(x, "sum", ranks.name)  # pyright: ignore[reportArgumentType]
        return functional.wait_tensor(total)
    dist.all_reduce(x, group=_resolve_process_group(ranks.name))  # pyright: ignore[reportArgumentType]
    return x
