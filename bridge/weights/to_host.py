"""Copying tensors from a GPU into ordinary, pageable host memory at the speed of the bus.

The bus is fast only into pinned memory, which is scarce. So a few pinned buffers are used in turn: while the GPU fills
one, threads copy the contents of others into the tensors' own memory. Tensors that are adjacent on the GPU, as the
matrices of a stack and its scales are, are copied together: a copy costs Python more time than the bytes of a matrix of
scales do.
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
AHEAD = 12  # buffers being filled or emptied while the caller uses a tensor: more than there are threads

Named = tuple[str, Tensor]


def to_host(rounds: Iterable[list[Named]]) -> Iterator[Named]:
    """The same tensors in host memory, in the same order. Tensors are copied together only within a round."""
    rounds = iter(rounds)
    first = next((tensors for tensors in rounds if tensors), [])
    rounds = chain([first], rounds)
    if not first or not first[0][1].is_cuda:
        yield from chain.from_iterable(rounds)
        return
    with ThreadPoolExecutor(THREADS, initializer=torch.cuda.set_device, initargs=(first[0][1].device,)) as pool:
        in_flight: deque[tuple[Future, list[Named]]] = deque()
        for started in _Buffers(pool).fill(rounds):
            in_flight.append(started)
            if len(in_flight) > AHEAD:
                yield from _finished(*in_flight.popleft())
        while in_flight:
            yield from _finished(*in_flight.popleft())


def _finished(emptied: Future, complete: list[Named]) -> list[Named]:
    emptied.result()
    return complete


class _Buffers:
    """Pinned buffers, filled from the GPU one after another and emptied by threads.

    Of the current one `_used` bytes are filled. `_parts` says where in host memory they go, and `_complete` which
    tensors have their last bytes in it.
    """

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool, self._free = pool, SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True))
        self._buffer, self._used, self._parts, self._complete = self._free.get(), 0, [], []

    def fill(self, rounds: Iterable[list[Named]]) -> Iterator[tuple[Future, list[Named]]]:
        """For each buffer, a future that is done when it is emptied, and the tensors that are complete from then on."""
        for tensors in rounds:
            results = [(name, torch.empty(tensor.shape, dtype=tensor.dtype)) for name, tensor in tensors]
            targets = [result.view(-1).view(torch.uint8).numpy() for _, result in results]
            for run, members in _runs([tensor for _, tensor in tensors]):
                yield from self._copy(run, [targets[index] for index in members])
            self._complete += results
        yield self._send()

    def _copy(self, run: Tensor, targets: list[np.ndarray]) -> Iterator[tuple[Future, list[Named]]]:
        """Start copying a run of adjacent tensors; `targets` is the host memory of each.

        So far `copied` bytes of the run are in buffers, and the current target begins at byte `start` of the run. Byte
        i of the run is byte `shift` + i of the current buffer.
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
        """Have the current buffer emptied once the GPU has filled it, and take a free one."""
        arrived = torch.cuda.Event()
        arrived.record()
        sent = self._pool.submit(_drain, self._buffer, self._parts, arrived, self._free), self._complete
        self._buffer, self._used, self._parts, self._complete = self._free.get(), 0, [], []
        return sent


def _runs(tensors: list[Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
    """Tensors that are adjacent in a storage as one run of bytes, and the indices of its members; no empty tensors."""
    tensors = [tensor.contiguous() for tensor in tensors]
    filled = [index for index, tensor in enumerate(tensors) if tensor.numel()]
    order = deque(sorted(filled, key=lambda index: tensors[index].data_ptr()))
    while order:
        members = [order.popleft()]
        first = tensors[members[0]]
        storage, begin = first.untyped_storage(), first.data_ptr()
        end, limit = begin + first.nbytes, storage.data_ptr() + storage.nbytes()
        while order and tensors[order[0]].data_ptr() == end < limit:
            members.append(order.popleft())
            end += tensors[members[-1]].nbytes
        run = torch.empty(0, dtype=torch.uint8, device=first.device)
        yield run.set_(storage, begin - storage.data_ptr(), (end - begin,), (1,)), members


def _drain(
    buffer: Tensor, parts: list[tuple[np.ndarray, int]], arrived: torch.cuda.Event, free: SimpleQueue[Tensor]
) -> None:
    """Wait until the buffer is filled, copy each part (target, its first byte in the buffer), and free the buffer."""
    arrived.synchronize()
    host = buffer.numpy()
    for target, start in parts:
        np.copyto(target, host[start : start + len(target)])  # torch's copy would start threads of its own
    free.put(buffer)
