"""Optimizers that megatron-core makes for a bfloat16 model with float32 routers, as hosts make them.

Of a parameter's state the float32 weights are enough to see whose it is.
"""

import inspect
from typing import Any

import pytest
import torch
from megatron.core import optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from support.small_model import SMALL
from torch import nn

from bridge.model.build import build_model
from bridge.model.optimizer_groups import keep_float32_apart
from bridge.model.process_groups import model_parallel


def distributed_optimizer(model: Any) -> Any:
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    return get_megatron_optimizer(config, [DistributedDataParallel(model.config, settings, model)])


def strangers(model: nn.Module, made: Any) -> set[str]:
    """Parameters under whose name another one's state is."""
    (inner,) = made.chained_optimizers
    found = {
        name: inner._get_main_param_and_optimizer_states(value)["param"] for name, value in model.named_parameters()
    }
    own = {name: value.detach().float().flatten() for name, value in model.named_parameters()}
    return {name for name in own if not torch.equal(found[name].float(), own[name])}


def test_each_parameter_has_its_own_state() -> None:
    """Nothing but the model is asked for it."""
    with model_parallel():
        model = build_model(SMALL, params_dtype=torch.bfloat16, backend="local")
        assert strangers(model, distributed_optimizer(model)) == set()


def test_megatron_core_still_mixes_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `bridge.model.optimizer_groups` is to go."""
    with model_parallel():
        model = build_model(SMALL, params_dtype=torch.bfloat16, backend="local")
        own = inspect.unwrap(optimizer._get_param_groups)
        assert own is not optimizer._get_param_groups
        monkeypatch.setattr(optimizer, "_get_param_groups", own)
        assert len(strangers(model, distributed_optimizer(model))) > 2


def test_twice_is_once() -> None:
    keep_float32_apart()
    once = optimizer._get_param_groups
    keep_float32_apart()
    assert optimizer._get_param_groups is once
