"""Whether torch looks at a call instead of only running it: then operators with fake kernels take its place."""

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
# Bound once: every eager call of a norm asks.
_is_compiling, _count_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack


def is_traced(x: Tensor) -> bool:
    """For a function's first tensor: whether what it calls must be operators that torch knows.

    So it is under torch.compile and torch.export; inside a dispatch mode (`FakeTensorMode`, `make_fx`, counters of
    FLOPs and memory, selective checkpointing); and where the tensor has no values to compute with (on the meta device)
    or is of a class of its own (fake, or a DTensor).
    """
    return _is_compiling() or _count_modes() > 0 or type(x) not in PLAIN or x.is_meta
