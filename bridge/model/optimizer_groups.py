"""A float32 router beside bfloat16 weights, in megatron-core's optimizers.

megatron-core 0.19's distributed optimizer numbers the parameters of a group in two orders, of which one has float32
first. A checkpoint of a group with both mixes up their states, or cannot be written. So float32 matrices get a group
of their own, or one for each set of overrides that its user gives them. Whoever makes the optimizer, a host's trainer
or a loop of one's own, makes it by megatron-core.
"""

from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import OptimizerConfig, ParamKey, ParamPredicate

from bridge.model.wrap_once import Function, wrap_once

# Parameters with other overrides are of other groups. This one is nobody else's, so it contradicts none, and no group
# keeps it. Groups are in the order of their overrides' names: after "wd_mult", which checkpoints of others have here.
_APART = "weights_dtype"
_FLOAT32 = ParamPredicate(
    "float32 matrices", lambda parameter: parameter.dtype == torch.float32 and parameter.dim() > 1
)
_OVERRIDES: dict[ParamKey, Any] = {ParamKey(predicate=_FLOAT32): {_APART: "float32"}}


def keep_float32_apart() -> None:
    """In every optimizer that megatron-core makes in this process from now on, of a model in half precision."""
    wrap_once(optimizer, "_get_param_groups", _with_groups_apart)


def _with_groups_apart(groups: Function) -> Function:
    def apart(model_chunks: Any, config: OptimizerConfig, config_overrides: Any, *rest: Any, **named: Any) -> Any:
        mixed = _OVERRIDES if config.bf16 or config.fp16 else {}
        made = groups(model_chunks, config, {**(config_overrides or {}), **mixed}, *rest, **named)
        for group in made:
            group.pop(_APART, None)
        return made

    return apart
