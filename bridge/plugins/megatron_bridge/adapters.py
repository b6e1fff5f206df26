"""Adapters of megatron-bridge that are not what they seem, and are refused.

Seen on two ranks, against `transformers`' gradients: an adapter on an expert that tensor parallelism cuts computes
another product than B A, because its inner layer is not summed over the ranks. And of adapters on experts that are
modules of their own (megatron-core's local layer spec), the host exports only those of one expert-parallel rank.
"""

# The host is not in the project's own environment.
# pyright: reportMissingImports=false

from collections.abc import Iterable, Iterator

from megatron.bridge.peft.utils import ParallelLinearAdapter
from megatron.core.utils import get_pg_size
from torch import nn


def check_training(models: Iterable[nn.Module]) -> None:
    """Refuse adapters on experts that tensor parallelism cuts.

    Raises:
        ValueError: names the expert's layer, and what to set instead.
    """
    for adapter in _on_experts(models):
        ranks = get_pg_size(adapter.tp_group)
        if ranks > 1:
            raise ValueError(
                f"{adapter.base_linear_name}: its adapter is wrong on {ranks} expert-tensor-parallel ranks, since the "
                f"host does not sum it over them; set expert_tensor_parallel_size=1, or leave linear_fc1 and "
                f"linear_fc2 out of the adapter's target_modules"
            )


def check_export(models: Iterable[nn.Module]) -> None:
    """Refuse what `check_training` refuses, and adapters of single experts that are on several ranks.

    Raises:
        ValueError: names the expert's layer, and what to set instead.
    """
    models = list(models)
    check_training(models)
    for adapter in _on_experts(models):
        ranks = get_pg_size(adapter.ep_group)
        if ranks > 1 and ".local_experts." in adapter.base_linear_name:
            raise ValueError(
                f"{adapter.base_linear_name}: of {ranks} expert-parallel ranks the host exports one rank's adapters; "
                f"export at expert_model_parallel_size=1, or use grouped experts (moe_grouped_gemm)"
            )


def _on_experts(models: Iterable[nn.Module]) -> Iterator[ParallelLinearAdapter]:
    for model in models:
        for module in model.modules():
            if isinstance(module, ParallelLinearAdapter) and module.is_expert:
                yield module
