"""Tensors of a GPU into ordinary host memory, at the speed of the bus.

The bus is fast only into pinned memory, and pinned memory is scarce: a few pinned buffers take turns, and threads move
the contents of each on into memory of the tensors' own while the next ones are under way. Tensors that lie one after
another on the GPU, as the matrices and the scales of a stack do, are copied as one: what Python does for each copy
costs more than the bytes of a matrix of scales.
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


def to_host(rounds: Iterable[list[Named]]) -> Iterator[Named]:
    """The same tensors on the host, in order; those of a round may lie together on the GPU."""
    rounds = iter(rounds)
    first = next((tensors for tensors in rounds if tensors), [])
    rounds = chain([first], rounds)
    if not first or not first[0][1].is_cuda:
        yield from chain.from_iterable(rounds)
        return
    with ThreadPoolExecutor(THREADS, initializer=torch.cuda.set_device, initargs=(first[0][1].device,)) as pool:
        under_way: deque[tuple[Future, list[Named]]] = deque()
        for started in _Buffers(pool).fill(rounds):
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

    def fill(self, rounds: Iterable[list[Named]]) -> Iterator[tuple[Future, list[Named]]]:
        """For each buffer: when it is emptied, and the tensors that are whole then (and were not before)."""
        for tensors in rounds:
            results = [(name, torch.empty(tensor.shape, dtype=tensor.dtype)) for name, tensor in tensors]
            targets = [result.view(-1).view(torch.uint8).numpy() for _, result in results]
            for run, members in _runs([tensor for _, tensor in tensors]):
                yield from self._copy(run, [targets[index] for index in members])
            self._whole += results
        yield self._send()

    def _copy(self, run: Tensor, targets: list[np.ndarray]) -> Iterator[tuple[Future, list[Named]]]:
        """Start copying a run, which is then cut into its targets.

        Byte i of the run lies at `shift` + i of the buffer; `copied` bytes are under way, `start` is where a target is.
        """
        copied, start, shift = 0, 0, 0
        for target in targets:
            done = 0
            while done < len(target):
                if start + done == copied:
                    if self._used == BUFFER_BYTES:
                        yield self._send()
                    part = run[copied : copied + BUFFER_BYTES - self._used]
                    self._buffer[self._used : self._used + len(part)].copy_(part, non_blocking=True)
                    shift = self._used - copied
                    self._used, copied = self._used + len(part), copied + len(part)
                piece = target[done : copied - start]
                self._parts.append((piece, shift + start + done))
                done += len(piece)
            start += done

    def _send(self) -> tuple[Future, list[Named]]:
        arrived = torch.cuda.Event()
        arrived.record()
        sent = self._pool.submit(_empty, self._buffer, self._parts, arrived, self._free), self._whole
        self._buffer, self._used, self._parts, self._whole = self._free.get(), 0, [], []
        return sent


def _runs(tensors: list[Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
    """The bytes of tensors that lie one after another in a storage, and which tensors they are; none that is empty."""
    tensors = [tensor.contiguous() for tensor in tensors]
    held = [index for index, tensor in enumerate(tensors) if tensor.numel()]
    order = deque(sorted(held, key=lambda index: tensors[index].data_ptr()))
    while order:
        members = [order.popleft()]
        first = tensors[members[0]]
        storage, begin = first.untyped_storage(), first.data_ptr()
        end, limit = begin + first.nbytes, storage.data_ptr() + storage.nbytes()
        while order and tensors[order[0]].data_ptr() == end < limit:
            members.append(order.popleft())
            end += tensors[members[-1]].nbytes
        run = torch.empty(0, dtype=torch.uint8, device=first.device)
        yield run.set_(storage, begin - storage.data_ptr(), (end - begin,)), members


def _empty(
    buffer: Tensor, parts: list[tuple[np.ndarray, int]], arrived: torch.cuda.Event, free: SimpleQueue[Tensor]
) -> None:
    arrived.synchronize()
    host = buffer.numpy()
    for target, start in parts:
        np.copyto(target, host[start : start + len(target)])  # torch's would start threads of its own in each of these
    free.put(buffer)
