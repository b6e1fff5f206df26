"""Tensors of a GPU into ordinary host memory, at the speed of the bus.

The bus is fast only into pinned memory, and pinned memory is scarce: a few pinned buffers take turns, and threads move
the contents of each on into memory of the tensors' own while the next ones are under way. A buffer takes part of a
large tensor or many small ones: what Python does for each costs more than the bytes of a matrix of scales.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

BUFFER_BYTES, BUFFERS, THREADS = 16 << 20, 16, 8
AHEAD = 12  # buffers on the way or being emptied while the caller uses a tensor: more than there are threads

Named = tuple[str, Tensor]


def to_host(tensors: Iterable[Named]) -> Iterator[Named]:
    """The same tensors on the host, in order."""
    tensors = iter(tensors)
    first = next(tensors, None)
    if first is None:
        return
    if not first[1].is_cuda:
        yield from chain([first], tensors)
        return
    with ThreadPoolExecutor(THREADS, initializer=torch.cuda.set_device, initargs=(first[1].device,)) as pool:
        under_way: deque[tuple[Future, list[Named]]] = deque()
        for started in _Buffers(pool).fill(chain([first], tensors)):
            under_way.append(started)
            if len(under_way) > AHEAD:
                yield from _finished(*under_way.popleft())
        while under_way:
            yield from _finished(*under_way.popleft())


def _finished(moved: Future, whole: list[Named]) -> list[Named]:
    moved.result()
    return whole


class _Buffers:
    """Pinned memory, and threads that empty it."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool, self._free = pool, SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True))
        self._buffer, self._used, self._parts, self._whole = self._free.get(), 0, [], []

    def fill(self, tensors: Iterable[Named]) -> Iterator[tuple[Future, list[Named]]]:
        """For each buffer: when it is emptied, and the tensors that are whole then (and were not before)."""
        for name, tensor in tensors:
            result = torch.empty(tensor.shape, dtype=tensor.dtype)
            source, target = (x.contiguous().view(-1).view(torch.uint8) for x in (tensor, result))
            start = 0
            while start < len(target):
                part = target[start : start + BUFFER_BYTES - self._used]
                place = slice(self._used, self._used + len(part))
                self._buffer[place].copy_(source[start : start + len(part)], non_blocking=True)
                self._parts.append((part.numpy(), place))
                self._used, start = place.stop, start + len(part)
                if self._used == BUFFER_BYTES and start < len(target):
                    yield self._send()
            self._whole.append((name, result))
            if self._used == BUFFER_BYTES:
                yield self._send()
        yield self._send()

    def _send(self) -> tuple[Future, list[Named]]:
        arrived = torch.cuda.Event()
        arrived.record()
        sent = self._pool.submit(_empty, self._buffer, self._parts, arrived, self._free), self._whole
        self._buffer, self._used, self._parts, self._whole = self._free.get(), 0, [], []
        return sent


def _empty(
    buffer: Tensor, parts: list[tuple[np.ndarray, slice]], arrived: torch.cuda.Event, free: SimpleQueue[Tensor]
) -> None:
    arrived.synchronize()
    for target, place in parts:
        np.copyto(target, buffer[place].numpy())  # torch's copy would start threads of its own in each of these
    free.put(buffer)
