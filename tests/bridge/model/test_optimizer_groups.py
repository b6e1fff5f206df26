"""Optimizers that megatron-core makes for a bfloat16 model with float32 routers, as hosts make them: without overrides.

Of a parameter's state the float32 weights are enough to see whose it is.
"""

import pytest
import torch
from megatron.core import optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from support.small_model import SMALL

from bridge.model.build import build_model
from bridge.model.optimizer_groups import keep_float32_apart
from bridge.model.process_groups import model_parallel


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's own, whatever this process has imported."""
    found = optimizer._get_param_groups
    monkeypatch.setattr(optimizer, "_get_param_groups", getattr(found, "__wrapped__", found))


def distributed_optimizer():
    model = build_model(SMALL, params_dtype=torch.bfloat16, backend="local")
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    return model, get_megatron_optimizer(config, [DistributedDataParallel(model.config, settings, model)])


def strangers(model: torch.nn.Module, made) -> set[str]:
    """Parameters under whose name another one's state is."""
    (inner,) = made.chained_optimizers
    found = {
        name: inner._get_main_param_and_optimizer_states(value)["param"] for name, value in model.named_parameters()
    }
    own = {name: value.detach().float().flatten() for name, value in model.named_parameters()}
    return {name for name in own if not torch.equal(found[name].float(), own[name])}


def test_megatron_core_still_mixes_them_up(untouched: None) -> None:
    """Else `bridge.model.optimizer_groups` is to go."""
    with model_parallel():
        model, made = distributed_optimizer()
        assert len(strangers(model, made)) > 2


def test_apart_each_parameter_has_its_own(untouched: None) -> None:
    with model_parallel():
        keep_float32_apart()
        assert strangers(*distributed_optimizer()) == set()


def test_twice_is_once(untouched: None) -> None:
    keep_float32_apart()
    once = optimizer._get_param_groups
    keep_float32_apart()
    assert optimizer._get_param_groups is once
