"""megatron-core's Adam whose state and float32 weights are on the processor, partly or all, against the GPU's own."""

from typing import Any

import pytest
import torch
from support.checks import NO_GPU
from support.optimizer_steps import made_of, put_gradients, wrapped_model

from bridge.model.process_groups import model_parallel

STEPS = 4
WHOLE: dict[str, Any] = {"use_distributed_optimizer": False}


def weights_after(dtype: torch.dtype, **settings: Any) -> dict[str, torch.Tensor]:
    wrapped = wrapped_model(dtype, **WHOLE)
    optimizer = made_of(wrapped, dtype, clip_grad=1.0, **settings)
    for step in range(1, STEPS + 1):
        put_gradients(wrapped, step)
        assert optimizer.step()[0]
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in wrapped.named_parameters()}


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_steps_are_those_of_the_gpu(fraction: float, dtype: torch.dtype) -> None:
    """To a rounding of the weights' dtype: torch's Adam and Transformer Engine's add up in another order."""
    with model_parallel():
        before = dict(wrapped_model(dtype, **WHOLE).named_parameters())
        plain = weights_after(dtype)
        offloaded = weights_after(dtype, optimizer_cpu_offload=True, optimizer_offload_fraction=fraction)
    assert offloaded.keys() == plain.keys()
    for name, value in plain.items():
        assert not torch.equal(value, before[name]), name
        off, size = (offloaded[name].float() - value.float()).abs(), value.float().abs()
        rounding = torch.finfo(dtype).eps * size + 8 * torch.finfo(torch.float32).eps * size.max()
        assert (off <= rounding).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_megatron_core_cannot_make_a_distributed_one(dtype: torch.dtype) -> None:
    """Where a weight is float32, as the router's always is. When it can, the table of what works together is wrong."""
    with model_parallel(), pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        made_of(wrapped_model(dtype), dtype, optimizer_cpu_offload=True, optimizer_offload_fraction=1.0)
