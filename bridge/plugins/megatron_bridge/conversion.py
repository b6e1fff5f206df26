"""The bridge that megatron-bridge finds for `MiniMaxM2ForCausalLM`: weights into its models and out of them.

Loading and export go through `bridge.minimax_m2_bridge`: each rank reads only its own rows, float8 goes to its device
as it is, and an untouched weight is exported with the source's bytes. The host's own loops, over the registry of
`bridge.plugins.megatron_bridge.mapping`, run where they are asked for (conversion tasks, parameters that may differ,
another dtype than bfloat16) or where only they know the model (adapters, norms in megatron-core's own slots, parameters
that are no plain tensors). All ranks take the same way.

An export has the dtypes of the source checkpoint; with `weight_dtype` everything is cast to that, and there are no
scales.
"""

# The host is not in the project's own environment.
# pyright: reportMissingImports=false

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import (
    HFWeightTuple,
    MegatronModelBridge,
    MegatronWeightTuple,
    WeightConversionTask,
)
from megatron.bridge.models.conversion.utils import persistent_buffers, unwrap_model
from megatron.core.models.gpt import GPTModel
from rich.progress import track
from torch import Tensor, nn

from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import all_gather_objects, is_rank_zero
from bridge.minimax_m2_bridge import MiniMaxM2Bridge as CheckpointBridge
from bridge.minimax_m2_bridge import plain_weight
from bridge.plugins.megatron_bridge.adapters import check_export
from bridge.plugins.megatron_bridge.mapping import mapping_registry
from bridge.plugins.megatron_bridge.provider import MiniMaxM2ModelProvider, provider_of
from bridge.plugins.megatron_bridge.saving import SourceEncoding, checkpoint_folder_of, use_checkpoint_source
from reference.config import FP8_BLOCK, ModelConfig

# Parts of a parameter's name that ours never has: of adapters, of megatron-core's own norms, of quantisers.
FOREIGN = (".adapter.", ".to_wrap.", ".q_layernorm.", ".k_layernorm.", "_quantizer.")


@MegatronModelBridge.register_bridge(
    source="MiniMaxM2ForCausalLM", target=GPTModel, provider=MiniMaxM2ModelProvider, model_type="minimax_m2"
)
class MiniMaxM2Bridge(MegatronModelBridge):
    """MiniMax-M2, M2.1, M2.5 and M2.7 for `AutoBridge`.

    Raises:
        ValueError: the checkpoint or its config is no MiniMax-M2, is damaged, or is not the model's; every error names
            the file, tensor or key. All ranks raise the same.
    """

    def provider_bridge(self, hf_pretrained: Any) -> MiniMaxM2ModelProvider:
        """The provider of the model that `hf_pretrained.config` describes, in its dtype (bfloat16 if it has none)."""
        hf_config = hf_pretrained.config
        return provider_of(ModelConfig.from_hf(hf_config.to_dict()), self.dtype_from_hf(hf_config, torch.bfloat16))

    def mapping_registry(self) -> MegatronMappingRegistry:
        """How each parameter is made of on-disk tensors, for the host's own loops."""
        return mapping_registry()

    def maybe_modify_loaded_hf_weight(
        self, hf_param: str | dict[str, str], hf_state_dict: Mapping[str, Tensor]
    ) -> Tensor | dict[str, Tensor]:
        """The weight of that name, dequantised to bfloat16 if it is float8; a dictionary of names gives one of weights.

        Raises:
            ValueError: a weight or its scales are missing or unusable; names the tensor.
        """
        options = {"block_size": self._block_size(), "dtype": torch.bfloat16}
        if isinstance(hf_param, dict):
            return {part: plain_weight(name, hf_state_dict, **options) for part, name in hf_param.items()}
        return plain_weight(hf_param, hf_state_dict, **options)

    def _block_size(self) -> int:
        return FP8_BLOCK if self.hf_config is None else ModelConfig.from_hf(self.hf_config.to_dict()).block_size

    def load_weights_hf_to_megatron(
        self,
        hf_pretrained: Any,
        megatron_model: Any,
        allowed_mismatched_params: list[str] | None = None,
    ) -> list[Any]:
        """Fill a model with the checkpoint's weights, each rounded once to its parameter's dtype."""
        models = _as_list(megatron_model)
        if allowed_mismatched_params or not self._is_ours(hf_pretrained, models):
            return super().load_weights_hf_to_megatron(hf_pretrained, models, allowed_mismatched_params)
        with _checkpoint_of(hf_pretrained) as checkpoint:
            checkpoint.load_hf_weights(models, progress=_bar)
        return models

    def stream_weights_hf_to_megatron(
        self, hf_pretrained: Any, megatron_model: Any, conversion_tasks: list[Any] | None = None
    ) -> Iterator[MegatronWeightTuple]:
        """This rank's value of each parameter, by the host's loop, dequantised first."""
        tasks = conversion_tasks or self.build_conversion_tasks(hf_pretrained, _as_list(megatron_model))
        for task in tasks:
            if task is not None and task.megatron_module is not None:
                weights = self.maybe_modify_loaded_hf_weight(task.mapping.hf_param, hf_pretrained.state)
                value = task.mapping.hf_to_megatron(weights, task.megatron_module)
                yield MegatronWeightTuple(task.param_name, value, task.vp_stage)

    def stream_weights_megatron_to_hf(
        self,
        megatron_model: Any,
        hf_pretrained: Any,
        cpu: bool = True,
        show_progress: bool = True,
        conversion_tasks: list[Any] | None = None,
        merge_adapter_weights: bool = True,
        weight_dtype: torch.dtype | None = None,
    ) -> Iterable[HFWeightTuple]:
        """Every weight of the model under its on-disk name, whole, on every rank; all must go through all of them.

        A float8 weight is followed by its `<name>_scale_inv`. The source's state is given a source that saves all of
        what is exported (`bridge.plugins.megatron_bridge.saving`).
        """
        models = _as_list(megatron_model)
        use_checkpoint_source(hf_pretrained, plain=weight_dtype is not None)
        known = conversion_tasks is None and weight_dtype in (None, torch.bfloat16)
        if known and self._is_ours(hf_pretrained, models):
            return _export(models, hf_pretrained, cpu, show_progress, weight_dtype)
        return super().stream_weights_megatron_to_hf(
            models, hf_pretrained, cpu, show_progress, conversion_tasks, merge_adapter_weights, weight_dtype
        )

    def build_conversion_tasks(
        self, hf_pretrained: Any, megatron_model: Any, weight_dtype: torch.dtype | None = None
    ) -> list[WeightConversionTask | None]:
        """The host's tasks; each exports what the source stores, once an adapter is merged."""
        tasks = super().build_conversion_tasks(hf_pretrained, megatron_model, weight_dtype)
        folder = checkpoint_folder_of(hf_pretrained)
        if folder is None:
            return tasks
        hook = SourceEncoding(folder, plain=weight_dtype is not None)
        return [task and replace(task, export_hook=hook) for task in tasks]

    def build_adapter_conversion_tasks(
        self, megatron_model: Any, exclude_adapter_base_prefixes: Iterable[str] | None = None
    ) -> dict[str, list[Any]]:
        """The host's tasks for adapters, to export them or to merge them.

        Raises:
            ValueError: the host would export others, or not all (`bridge.plugins.megatron_bridge.adapters`).
        """
        check_export(_as_list(megatron_model))
        return super().build_adapter_conversion_tasks(megatron_model, exclude_adapter_base_prefixes)

    def _is_ours(self, hf_pretrained: Any, models: list[Any]) -> bool:
        """Whether our own loops know the source and the model, on all ranks."""
        known = checkpoint_folder_of(hf_pretrained) is not None and getattr(self, "export_weight_dtype", "") != "fp8"
        for model in unwrap_model(models):
            tensors = chain(model.named_parameters(), persistent_buffers(model))
            known &= not any(_is_foreign(name, tensor) for name, tensor in tensors)
        return all(all_gather_objects(known))


def _is_foreign(name: str, tensor: Tensor) -> bool:
    return any(part in name for part in FOREIGN) or type(tensor) not in (nn.Parameter, Tensor)


def _export(
    models: list[Any], hf_pretrained: Any, cpu: bool, show_progress: bool, weight_dtype: torch.dtype | None
) -> Iterator[HFWeightTuple]:
    with _checkpoint_of(hf_pretrained) as checkpoint:
        exported = checkpoint.export_hf_weights(
            models,
            "source" if weight_dtype is None else "bf16",
            device="cpu" if cpu else None,
            progress=_bar if show_progress else no_progress,
        )
        for name, tensor in exported:
            yield HFWeightTuple(name, tensor if weight_dtype is None else tensor.to(weight_dtype))


def _checkpoint_of(hf_pretrained: Any) -> CheckpointBridge:
    folder = checkpoint_folder_of(hf_pretrained)
    assert folder is not None  # `_is_ours` has asked
    return CheckpointBridge.from_hf_pretrained(folder)


def _as_list(megatron_model: Any) -> list[Any]:
    return megatron_model if isinstance(megatron_model, list) else [megatron_model]


def _show(items: Iterable, what: str, length: int) -> Iterable:
    return track(items, description=what, total=length, disable=not is_rank_zero())


_bar: Progress = _show
