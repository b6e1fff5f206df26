"""The collectives that a process takes part in, seen from outside."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WHOLE = {  # which argument is the whole tensor, of which each rank has or gets a part
    torch.ops.c10d._allgather_base_.default: 0,
    torch.ops.c10d._reduce_scatter_base_.default: 1,
}


class Collectives(TorchDispatchMode):
    """Inside, `nbytes` grows by the whole tensor of each all-gather and each reduce-scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WHOLE:
            self.nbytes += args[_WHOLE[func]].nbytes
        return func(*args, **(kwargs or {}))
