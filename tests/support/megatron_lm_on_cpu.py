"""Runs a script of Megatron-LM's on a host without a GPU: `python megatron_lm_on_cpu.py pretrain_gpt.py ARGUMENTS`.

megatron-core runs there inside `bridge.megatron_on_cpu()`. The scripts ask more of CUDA: whether it is there, what it
can do, how much of its memory is used, and to move tensors to it. The table answers for the CPU; arithmetic is
untouched.
"""

import os
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than a few steps

import torch

from bridge import megatron_on_cpu

DEVICE = SimpleNamespace(major=9, minor=0, name="CPU", total_memory=1 << 30, multi_processor_count=1)
ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "is_initialized": lambda: False,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: DEVICE,
    "mem_get_info": lambda *_: (1 << 30, 1 << 30),
    "memory_stats": lambda *_: defaultdict(int),
    "is_current_stream_capturing": lambda: False,
    **dict.fromkeys(("set_device", "empty_cache", "manual_seed_all", "reset_peak_memory_stats"), lambda *_: None),
    **dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), lambda *_: 0
    ),
}
TYPES = ("IntTensor", "LongTensor", "FloatTensor", "DoubleTensor", "ByteTensor")
FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "ones_like",
    "zeros_like",
    "empty_like",
    "rand",
    "randn",
)


def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, for which "cuda" is the CPU."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        return factory(*args, device="cpu" if device is not None and "cuda" in str(device) else device, **kwargs)

    return made


def main() -> None:
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    with ExitStack() as stack:
        stack.enter_context(megatron_on_cpu())
        replaced = [(torch.cuda, name, answer) for name, answer in ANSWERS.items()]
        replaced += [(torch.cuda, name, getattr(torch, name)) for name in TYPES]
        replaced += [(torch, name, on_cpu(getattr(torch, name))) for name in FACTORIES]
        replaced += [(torch.Tensor, name, lambda self, *_, **__: self) for name in ("cuda", "pin_memory")]
        replaced += [(torch.nn.Module, "cuda", lambda self, *_: self)]
        for owner, name, replacement in replaced:
            stack.enter_context(patch.object(owner, name, replacement))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
