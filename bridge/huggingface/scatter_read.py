"""Bytes of a file into many buffers with few calls of the system.

Each call costs a thread a wait for Python's lock, which other threads hold, so what lies one after another in the file
is read by one `preadv`, however many buffers it goes to.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")  # of one preadv


class Read(NamedTuple):
    """The bytes of a file from `offset` on fill `buffer`, which is contiguous and of bytes."""

    offset: int
    buffer: memoryview


def scatter_read(file: int, reads: Iterable[Read]) -> bool:
    """Fill each buffer from the file descriptor; False if the file ends before. Threads may share the descriptor."""
    return all(_fill(file, offset, buffers) for offset, buffers in _runs(reads))


def _runs(reads: Iterable[Read]) -> Iterator[tuple[int, deque[memoryview]]]:
    """Runs of bytes that follow one another in the file: where each starts, and the buffers that it fills in turn."""
    start, end, buffers = 0, 0, deque[memoryview]()
    for offset, buffer in sorted((read for read in reads if len(read.buffer)), key=lambda read: read.offset):
        if buffers and (offset != end or len(buffers) == _MAX_BUFFERS):
            yield start, buffers
            buffers = deque[memoryview]()
        if not buffers:
            start = offset
        buffers.append(buffer)
        end = offset + len(buffer)
    if buffers:
        yield start, buffers


def _fill(file: int, offset: int, buffers: deque[memoryview]) -> bool:
    while buffers:
        count = os.preadv(file, buffers, offset)  # may be fewer bytes than there is room for: at most 2 GiB on Linux
        if count == 0:
            return False
        offset += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.popleft())
        if count:
            buffers[0] = buffers[0][count:]
    return True
