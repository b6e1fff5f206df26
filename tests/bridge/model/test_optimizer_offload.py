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
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_steps_of_float32_are_those_of_the_gpu(fraction: float) -> None:
    """To a rounding of the weights: torch's Adam and Transformer Engine's add up in another order."""
    with model_parallel():
        before = dict(wrapped_model(torch.float32, **WHOLE).named_parameters())
        plain = weights_after(torch.float32)
        offloaded = weights_after(torch.float32, optimizer_cpu_offload=True, optimizer_offload_fraction=fraction)
    assert offloaded.keys() == plain.keys()
    for name, value in plain.items():
        assert not torch.equal(value, before[name]), name
        off, size = (offloaded[name] - value).abs(), value.abs()
        assert (off <= torch.finfo(torch.float32).eps * (size + 8 * size.max())).all(), name


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_bfloat16_fails_at_its_first_step(fraction: float) -> None:
    """megatron-core looks for a float32 weight among the model's. When it does not, the table is wrong."""
    with model_parallel(), pytest.raises(KeyError):
        weights_after(torch.bfloat16, optimizer_cpu_offload=True, optimizer_offload_fraction=fraction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_megatron_core_cannot_make_a_distributed_one(dtype: torch.dtype) -> None:
    """Where a weight is float32, as the router's always is. When it can, the table of what works together is wrong."""
    with model_parallel(), pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        made_of(wrapped_model(dtype), dtype, optimizer_cpu_offload=True, optimizer_offload_fraction=1.0)
