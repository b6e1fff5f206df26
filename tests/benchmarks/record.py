"""What every recorded result says of the machine, how a step is timed, and what a benchmark of kernels is asked."""

import argparse
import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
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


def asked_on_a_gpu(description: str, *flags: str) -> argparse.Namespace:
    """The command line of a benchmark of kernels that are only for GPUs: where the result goes, and flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"{Path(parser.prog).stem} needs an NVIDIA GPU: its kernels have no other form")
    return asked


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
