"""Runs of bytes out of a file: one after another, or one every so many bytes, as the columns of a matrix lie.

Tensor parallelism cuts w2 and o_proj by columns: 3072 runs of 768 bytes out of each expert's w2 at two ranks. One
`preadv` a run costs Python 2 microseconds, and threads wait for each other's lock. Linux takes a thousand reads in one
call by `io_submit`, at half that time and with the lock released; Python has no wrapper for it, so numpy fills the
structs. Reads through the page cache are done when it returns. Where the call is not to be had, `preadv` does it.
"""

import ctypes
import os
import platform
import queue
import sys

import numpy as np

_RUNS = 1024  # of one call
_CALLS = {"x86_64": (206, 209, 208), "aarch64": (0, 2, 4)}  # Linux's numbers of io_setup, io_submit, io_getevents
_REQUEST = np.dtype(
    {
        "names": ["data", "key", "opcode", "priority", "file", "buffer", "nbytes", "offset", "reserved", "flags"],
        "formats": ["u8", "u8", "u2", "i2", "u4", "u8", "u8", "i8", "u8", "u8"],
    }
)
_EVENT = np.dtype([("data", "u8"), ("request", "u8"), ("result", "i8"), ("result2", "i8")])
_PAGE = 4096  # with a run in every page the kernel may fetch them all ahead


def read_runs(file: int, buffer: np.ndarray, offset: int, run: int, pitch: int) -> bool:
    """Fill a buffer of bytes with runs of `run` bytes, one every `pitch` from `offset`; False if the file ends."""
    if buffer.nbytes <= run:
        return _read(file, memoryview(buffer), offset)
    if pitch < _PAGE:
        os.posix_fadvise(file, offset, buffer.nbytes // run * pitch, os.POSIX_FADV_WILLNEED)
    queued = _take()
    if queued is not None:
        own = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)  # threads that share a descriptor wait for its counter
        try:
            if queued.read(own, buffer, offset, run, pitch):
                return True
        finally:
            os.close(own)
            if queued.usable:
                _idle.put(queued)
    rows = buffer.reshape(-1, run)
    return all(_read(file, memoryview(row), offset + i * pitch) for i, row in enumerate(rows))


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
        setup, self._submit, self._collect = _CALLS[platform.machine()]
        self._context, self._syscall = ctypes.c_ulong(0), ctypes.CDLL(None, use_errno=True).syscall
        self.usable = self._syscall(setup, ctypes.c_long(_RUNS), ctypes.byref(self._context)) == 0
        self._index = np.arange(_RUNS)
        self._requests, self._events = np.zeros(_RUNS, _REQUEST), np.zeros(_RUNS, _EVENT)  # opcode 0 is pread
        self._pointers = self._requests.ctypes.data + _REQUEST.itemsize * np.arange(_RUNS, dtype=np.uint64)

    def read(self, file: int, buffer: np.ndarray, offset: int, run: int, pitch: int) -> bool:
        """False if some run was not read whole, for whatever reason: then it is for `preadv` to say."""
        total = buffer.nbytes // run
        requests, index = self._requests[:total], self._index[:total]
        requests["file"], requests["nbytes"] = file, run
        requests["buffer"], requests["offset"] = buffer.ctypes.data + index * run, offset + index * pitch
        for first in range(0, total, _RUNS):
            count = min(_RUNS, total - first)
            if not self._round(count) or not (self._events["result"][:count] == run).all():
                return False
            if first + count < total:
                requests["buffer"] += _RUNS * run
                requests["offset"] += _RUNS * pitch
        return True

    def _round(self, count: int) -> bool:
        sent = self._call(self._submit, count, self._pointers.ctypes.data)
        if sent > 0:  # none may be left in the queue, nor write into the buffer later
            got = self._call(self._collect, sent, sent, self._events.ctypes.data, None)
            self.usable = got == sent
        else:
            self.usable = False
        return sent == count and self.usable

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
