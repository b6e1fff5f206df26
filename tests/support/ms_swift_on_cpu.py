"""`megatron sft` on a host without a GPU, by gloo: `python -m support.ms_swift_on_cpu OPTIONS`, also under torchrun.

Everything is the host's own: arguments, data, trainer, schedule, saving. Besides what `megatron_on_cpu` answers, moving
a model to the GPU does nothing, and megatron-core's optimizers are those that it has without Transformer Engine, whose
are CUDA kernels. Options that need a GPU (`ON_CPU`) are off.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

ON_CPU = {
    "attention_backend": "unfused",
    "padding_free": "false",
    "use_distributed_optimizer": "false",
    "clip_grad": "0",  # megatron-core's clipping wants CUDA tensors
    "optimizer": "sgd",
    "moe_grouped_gemm": "false",
    "moe_token_dispatcher_type": "allgather",
    "bias_dropout_fusion": "false",
    "bias_activation_fusion": "false",
    "gradient_accumulation_fusion": "false",
    "apply_rope_fusion": "false",
    "megatron_extra_kwargs": '{"use_cpu_initialization": true, "transformer_impl": "local", '
    '"variable_seq_lengths": false, "bias_activation_fusion": false, "bias_dropout_fusion": false}',
    "dataloader_num_workers": "0",
    "dataset_num_proc": "1",
    "load_from_cache_file": "false",
}


@contextmanager
def optimizers_on_cpu() -> Iterator[None]:
    """megatron-core's optimizers as they are without Transformer Engine; a module stays where it is."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import optimizer as wrappers
    from swift.megatron.trainers import base

    from bridge.model.cpu import _TorchOnCPU

    replacements: tuple[tuple[Any, str, Any], ...] = (
        (nn.Module, "cuda", lambda module, *_: module),
        (optimizer, "SGD", torch.optim.SGD),
        (wrappers, "torch", _TorchOnCPU()),
        (base, "warmup_jit_function", lambda *_: None),
        (wrappers, "multi_tensor_applier", utils.local_multi_tensor_applier),
        (wrappers, "multi_tensor_scale_impl", utils.local_multi_tensor_scale),
    )
    with ExitStack() as stack:
        for owner, attribute, replacement in replacements:
            stack.enter_context(patch.object(owner, attribute, replacement))
        yield


def main(options: list[str]) -> None:
    from bridge.model.cpu import megatron_on_cpu

    cpu = [word for name, value in ON_CPU.items() for word in (f"--{name}", value)]
    with megatron_on_cpu():
        from swift.megatron import megatron_sft_main

        with optimizers_on_cpu():
            megatron_sft_main([*options, *cpu])


if __name__ == "__main__":
    main(sys.argv[1:])
