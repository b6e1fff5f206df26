"""What autograd keeps between a forward pass and its backward pass, seen from outside."""

from collections.abc import Callable, Iterable
from weakref import WeakSet

import torch
from torch import Tensor


class _Kept:
    """One tensor that a node of the graph keeps; it goes when the node goes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_storages(run: Callable[[], Tensor], but: Iterable[Tensor]) -> list[int]:
    """Bytes of each storage that is kept after `run`, whose result holds the graph; not those of the tensors `but`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in but}
    kept: WeakSet[_Kept] = WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        one = _Kept(tensor)
        kept.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        result = run()
    storages = {}
    for one in kept:
        storage = one.tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
    del result
    return sorted(storages.values(), reverse=True)
