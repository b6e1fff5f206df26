"""megatron-core's Muon, for `support.megatron_training.train`."""

from collections.abc import Callable
from typing import Any

LEARNING_RATE, ADAM_EPSILON = 0.02, 1e-3  # an epsilon that is not lost beside a gradient


def muon(tp_mode: str, ddp: list[Any]) -> Callable[[], object]:
    """What makes a step of the wrapped chunks; matrices by Muon, the others by Adam."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

    config = OptimizerConfig(
        optimizer="muon",
        lr=LEARNING_RATE,
        weight_decay=0.0,
        clip_grad=0.0,
        adam_eps=ADAM_EPSILON,
        muon_tp_mode=tp_mode,
        muon_fp32_matmul_prec="highest",
    )
    overrides: Any = get_standard_config_overrides(config)
    return get_megatron_optimizer(config, ddp, overrides).step
