"""How much of a step the GPU does nothing: one less the union of its kernels' intervals over the step's time.

And what it does the rest of the time, and after which kernel it waits for the host.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

Interval = tuple[float, float]
LONGEST = 12  # of kernels and of gaps
MARK = "spin_kernel"  # of torch.cuda._sleep
NAME = 100  # characters of a kernel's name; the rest are template arguments


class Work(NamedTuple):
    """A kernel or a copy, from when to when, in microseconds."""

    start: float
    end: float
    name: str


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals (start, end); streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def longest_kernels(works: Iterable[Work]) -> dict[str, float]:
    """Milliseconds in all by kernel, the most first."""
    spent: Counter[str] = Counter()
    for work in works:
        spent[work.name[:NAME]] += (work.end - work.start) / 1e3
    return {name: round(ms, 3) for name, ms in spent.most_common(LONGEST)}


def longest_gaps(works: Sequence[Work]) -> dict[str, float]:
    """Milliseconds in which nothing ran, by the kernels before and after, the most first."""
    spent: Counter[str] = Counter()
    last, *others = sorted(works)
    for work in others:
        if work.start > last.end:
            spent[f"{last.name[:NAME]} -> {work.name[:NAME]}"] += (work.start - last.end) / 1e3
        last = max(last, work, key=lambda one: one.end)
    return {name: round(ms, 3) for name, ms in spent.most_common(LONGEST)}


def since_mark(works: Sequence[Work]) -> list[Work]:
    """Those after the last kernel that is called `MARK`."""
    mark = max(work.end for work in works if MARK in work.name)
    return [work for work in works if work.start >= mark]


def profiled(step: Callable[[], object]) -> dict[str, Any]:
    """Seconds of one step under the profiler, the share of them in which no kernel and no copy ran, and which ran.

    It is the second one: in the first each thread waits for the profiler to make room for its records, milliseconds in
    which the GPU has nothing to do. The profiler makes a step slower all the same, so that the share is an upper bound;
    compare its seconds with those of a step without it.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda._sleep(1)  # MARK
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    works = since_mark(
        [
            Work(event.time_range.start, event.time_range.end, event.name)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation  # a span of kernels
        ]
    )
    busy = covered((work.start, work.end) for work in works) / 1e6
    found: dict[str, Any] = {"seconds": seconds, "busy seconds": busy, "idle share": 1 - busy / seconds}
    return found | {"kernels, ms": longest_kernels(works), "gaps, ms": longest_gaps(works)}
