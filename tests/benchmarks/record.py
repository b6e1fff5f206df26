"""What every recorded result says of the machine, and how a step is timed."""

import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core", "megatron-bridge", "liger-kernel")


def environment() -> dict[str, Any]:
    """Hardware, versions and date."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = (distribution.metadata["Name"] for distribution in importlib.metadata.distributions())
    installed = {name.lower().replace("_", "-") for name in names}
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": gpus or [platform.processor() or platform.machine()],
        "cuda": torch.version.cuda,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if name in installed},
    }


def median_ms(step: Callable[[], object], *, warm_up: int, runs: int) -> float:
    """Median milliseconds of a step between CUDA events."""
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
