"""How much of a step the GPU does nothing: one less the union of its kernels' intervals over the step's time."""

import time
from collections.abc import Callable, Iterable

import torch

Interval = tuple[float, float]


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals (start, end); streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def profiled(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of one step under the profiler, and the share of them in which no kernel and no copy ran.

    The profiler makes a step slower, so that the share is an upper bound; compare its seconds with those of a step
    without it.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    events = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation  # a span of kernels
    ]
    busy = covered((event.time_range.start, event.time_range.end) for event in events) / 1e6
    return {"seconds": seconds, "idle share": 1 - busy / seconds}
