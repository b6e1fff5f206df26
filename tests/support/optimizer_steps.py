"""A small model in megatron-core's `DistributedDataParallel`, its optimizers, and gradients that are drawn."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

from bridge.model.build import build_model
from support.accumulation import KEPT
from support.small_model import SMALL

BETAS = {"adam_beta1": 0.9, "adam_beta2": 0.999}


def wrapped_model(dtype: torch.dtype, **ddp: Any) -> Any:
    model = build_model(SMALL, params_dtype=dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator(parameter.device).manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, device=parameter.device, generator=generator))
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(**KEPT | ddp), model)


def made_of(wrapped: Any, dtype: torch.dtype, **settings: Any) -> Any:
    config = OptimizerConfig(
        **{"optimizer": "adam", "lr": 1e-2, "weight_decay": 0.1, "bf16": dtype == torch.bfloat16}
        | BETAS
        | {"params_dtype": dtype, "use_distributed_optimizer": wrapped.ddp_config.use_distributed_optimizer}
        | settings
    )  # fmt: skip
    return get_megatron_optimizer(config, [wrapped], get_standard_config_overrides(config))


def put_gradients(wrapped: Any, step: int, spoilt: float | None = None) -> None:
    """Where a backward pass leaves them; small at the second step, and so not clipped."""
    wrapped.zero_grad_buffer()
    for number, parameter in enumerate(wrapped.parameters()):
        generator = torch.Generator(parameter.device).manual_seed(1000 * step + number)
        drawn = torch.randn(parameter.shape, device=parameter.device, generator=generator)
        parameter.main_grad.copy_(drawn * (1e-6 if step == 2 else 1))
    if spoilt is not None:
        parameter.main_grad.view(-1)[-1] = spoilt
