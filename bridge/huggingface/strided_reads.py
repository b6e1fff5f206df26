"""Runs of bytes out of a file: one after another, or one every so many bytes, as the columns of a matrix lie.

Tensor parallelism cuts w2 and o_proj by columns: 3072 runs of 768 bytes out of each expert's w2 at two ranks. One
`preadv` a run costs Python 2 microseconds, and each waits for the lock that the other threads and the decoding hold.
Linux takes hundreds of reads, of any sizes, in one call by `io_submit`, at half that time and with the lock released;
Python has no wrapper for it, so numpy fills the structs. Reads through the page cache are done when it returns. Where
the call is not to be had, `preadv` does it.
"""

import ctypes
import os
import platform
import queue
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

_RUNS = 512  # of one call; all queues of a host together may take 65,536, unless fs.aio-max-nr says otherwise
_FEW = 3  # so many whole runs are as fast one by one
# Linux's numbers of io_setup, io_destroy, io_submit, io_getevents
_CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
_REQUEST = np.dtype(
    {
        "names": ["data", "key", "opcode", "priority", "file", "buffer", "nbytes", "offset", "reserved", "flags"],
        "formats": ["u8", "u8", "u2", "i2", "u4", "u8", "u8", "i8", "u8", "u8"],
    }
)
_EVENT = np.dtype([("data", "u8"), ("request", "u8"), ("result", "i8"), ("result2", "i8")])
_PAGE = 4096  # with a run in every page the kernel may fetch them all ahead


class Span(NamedTuple):
    """`nbytes` of a file: runs of `run` bytes, one every `pitch`, from `offset` on."""

    offset: int
    run: int
    pitch: int
    nbytes: int


Read = tuple[np.ndarray, Span]  # the bytes that the span fills


def read_spans(file: int, reads: Sequence[Read]) -> bool:
    """Fill each buffer of bytes with its span; False if the file ends before."""
    reads = [(buffer, span) for buffer, span in reads if span.nbytes]
    if all(span.run == span.nbytes for _, span in reads) and len(reads) < _FEW:
        return all(_read(file, memoryview(buffer), span.offset) for buffer, span in reads)
    for _, span in reads:
        if span.run < span.nbytes and span.pitch < _PAGE:
            os.posix_fadvise(file, span.offset, span.nbytes // span.run * span.pitch, os.POSIX_FADV_WILLNEED)
    return _read_queued(file, reads) or all(
        _read(file, memoryview(row), span.offset + i * span.pitch)
        for buffer, span in reads
        for i, row in enumerate(buffer.reshape(-1, span.run))
    )


def release() -> None:
    """Give the idle queues back to the host. The kernel takes 30 ms for each, and nobody waits for it."""
    threading.Thread(target=_destroy_idle).start()


def _destroy_idle() -> None:
    with suppress(queue.Empty):
        while True:
            _idle.get_nowait().destroy()


def _read_queued(file: int, reads: Sequence[Read]) -> bool:
    """False if some run was not read whole, for whatever reason: then it is for `preadv` to say."""
    queued = _take()
    if queued is None:
        return False
    try:
        own = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)  # threads that share a descriptor wait for its counter
    except OSError:
        _idle.put(queued)
        return False
    try:
        return queued.read(own, reads)
    finally:
        os.close(own)
        if queued.usable:
            _idle.put(queued)
        else:  # requests that are under way end first: none may write into the buffers later
            queued.destroy()


def _read(file: int, view: memoryview, offset: int) -> bool:
    done = 0
    while done < len(view):  # Linux hands over at most 2 GiB a call
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


class _Queue:
    """One of the kernel's queues of reads (`io_setup`), with room for `_RUNS`; used by one thread at a time."""

    def __init__(self) -> None:
        setup, self._destroy, self._submit, self._collect = _CALLS[platform.machine()]
        self._context, self._syscall = ctypes.c_ulong(0), ctypes.CDLL(None, use_errno=True).syscall
        self.usable = self._syscall(setup, ctypes.c_long(_RUNS), ctypes.byref(self._context)) == 0
        self._index = np.arange(_RUNS)
        self._requests, self._events = np.zeros(_RUNS, _REQUEST), np.zeros(_RUNS, _EVENT)  # opcode 0 is pread
        self._pointers = self._requests.ctypes.data + _REQUEST.itemsize * np.arange(_RUNS, dtype=np.uint64)

    def read(self, file: int, reads: Sequence[Read]) -> bool:
        """Whether all of it was read."""
        self._requests["file"], filled = file, 0
        for buffer, span in reads:
            first, runs = 0, span.nbytes // span.run
            while first < runs:
                count = min(runs - first, _RUNS - filled)
                requests, index = self._requests[filled : filled + count], self._index[:count]
                requests["nbytes"] = requests["data"] = span.run
                requests["buffer"] = buffer.ctypes.data + first * span.run + index * span.run
                requests["offset"] = span.offset + first * span.pitch + index * span.pitch
                first, filled = first + count, filled + count
                if filled == _RUNS:
                    if not self._round(filled):
                        return False
                    filled = 0
        return self._round(filled)

    def _round(self, count: int) -> bool:
        """Whether the first `count` requests were read whole."""
        if not count:
            return True
        sent = self._call(self._submit, count, self._pointers.ctypes.data)
        if sent > 0:
            got = self._call(self._collect, sent, sent, self._events.ctypes.data, None)
            self.usable = got == sent
        else:
            self.usable = False
        events = self._events[:sent]
        return sent == count and self.usable and bool((events["result"] == events["data"]).all())

    def destroy(self) -> None:
        if self._context:
            self._call(self._destroy)

    def _call(self, number: int, *operands: int | None) -> int:
        return self._syscall(
            ctypes.c_long(number), self._context, *(None if x is None else ctypes.c_long(x) for x in operands)
        )


_idle: queue.SimpleQueue[_Queue] = queue.SimpleQueue()


def _take() -> _Queue | None:
    try:
        return _idle.get_nowait()
    except queue.Empty:
        if sys.platform != "linux" or platform.machine() not in _CALLS:
            return None
        fresh = _Queue()
        return fresh if fresh.usable else None
