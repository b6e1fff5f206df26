"""Optimizers that megatron-core makes for a bfloat16 model with float32 routers, as hosts make them.

Of a parameter's state the float32 weights are enough to see whose it is.
"""

import inspect
from typing import Any

import pytest
import torch
from megatron.core import optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from support.small_model import SMALL
from torch import nn

from bridge.model.build import build_model
from bridge.model.optimizer_groups import keep_float32_apart
from bridge.model.process_groups import model_parallel


def distributed_optimizer(model: Any, overrides: dict[ParamKey, Any] | None = None) -> Any:
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    wrapped = DistributedDataParallel(model.config, settings, model)
    return get_megatron_optimizer(config, [wrapped], config_overrides=overrides)


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


STANDARD = optimizer.get_standard_config_overrides(OptimizerConfig(lr=1e-3))
OVERRIDES: dict[str, dict[ParamKey, Any]] = {
    "none": {},
    "megatron-core's own": STANDARD,
    "of routers": {ParamKey(name="*router.weight"): {"wd_mult": 0.0}},
    "of routers, beside megatron-core's own": {**STANDARD, ParamKey(name="*router.weight"): {"wd_mult": 0.0}},
    "of all": {ParamKey(name="*"): {"wd_mult": 0.5}},
    "of one router": {ParamKey(name="*layers.0.mlp.router.weight"): {"max_lr": 2e-3, "wd_mult": 0.5}},
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_are_their_user_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter's settings are those that megatron-core alone gives it, and no group has two dtypes."""
    with model_parallel():
        model = build_model(SMALL, params_dtype=torch.bfloat16, backend="local")
        assert strangers(model, distributed_optimizer(model, dict(OVERRIDES[name]))) == set()
        names = {value: key for key, value in model.named_parameters()}
        config = OptimizerConfig(lr=1e-3, bf16=True)
        ours = optimizer._get_param_groups([model], config, OVERRIDES[name])
        monkeypatch.setattr(optimizer, "_get_param_groups", inspect.unwrap(optimizer._get_param_groups))
        alone = optimizer._get_param_groups([model], config, OVERRIDES[name])
    theirs, found = (
        {names[value]: {**group, "params": None} for group in groups for value in group["params"]}
        for groups in (alone, ours)
    )
    assert found == theirs
    assert all(len({value.dtype for value in group["params"]}) == 1 for group in ours)
    mixed = sum(len({value.dtype for value in group["params"]}) > 1 for group in alone)
    assert len(ours) == len(alone) + mixed


def test_groups_are_in_the_order_of_earlier_checkpoints() -> None:
    """Which had float32 matrices behind parameters without weight decay."""
    with model_parallel():
        model = build_model(SMALL, params_dtype=torch.bfloat16, backend="local")
        made = optimizer._get_param_groups([model], OptimizerConfig(lr=1e-3, bf16=True), STANDARD)
    kinds = [({value.dtype for value in group["params"]}, group["wd_mult"]) for group in made]
    assert kinds == [({torch.bfloat16}, 1.0), ({torch.bfloat16}, 0.0), ({torch.float32}, 1.0)]


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
