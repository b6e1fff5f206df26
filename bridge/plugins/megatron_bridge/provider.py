"""megatron-bridge's model provider for MiniMax-M2: its `GPTModelProvider` with the fields that `bridge.model` gives.

The layer spec is a named function of a module, because megatron-bridge writes its name, and this class's, into the
`run_config.yaml` of every checkpoint; both modules are declared as ones that such a file may name.
"""

# The host is not in the project's own environment.
# pyright: reportMissingImports=false

from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.models.gpt import GPTModel

from bridge.model.build import pipeline_layout
from bridge.model.config import (
    gpt_model_arguments,
    leave_out_refused_fusions,
    transformer_config_fields,
    without_outdated_warnings,
)
from bridge.model.layer_spec import minimax_m2_block_spec
from bridge.model.safe_settings import VIRTUAL_STAGES_ON_TWO_RANKS, check_settings
from bridge.plugins.megatron_bridge.adapters import check_training
from reference.config import ModelConfig
from reference.parallelism import spread_layers
from reference.rope import inverse_frequencies

for _module in (__name__, minimax_m2_block_spec.__module__):
    register_allowed_target_prefix(_module)

# megatron-core's defaults, which the host's provider overrides.
OFF = {"masked_softmax_fusion": False, "cross_entropy_loss_fusion": False}

# What `GPTModel` calls it, and what the provider does.
RENAMED = {"max_sequence_length": "seq_length"}


@dataclass
class MiniMaxM2ModelProvider(GPTModelProvider):
    """A provider whose models equal `bridge.build_model`'s: layers that do not divide over the stages are spread."""

    def finalize(self) -> None:
        """megatron-core's own checks and derived fields, on a pipeline for which it has what it needs.

        Stages are laid out where the layers do not divide over them and the caller has not said how; two pipeline
        ranks with virtual stages get the settings with which megatron-core does not mix up their messages. Fused
        kernels that would be wrong beside other settings are left out: nobody need have asked for them.

        Raises:
            ValueError: settings do not work together for this model (`bridge.model.safe_settings`).
        """
        pp, virtual = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        stages = pp * (virtual or 1)
        said = (
            self.pipeline_model_parallel_layout,
            self.num_layers_in_first_pipeline_stage,
            self.num_layers_in_last_pipeline_stage,
            self.account_for_embedding_in_pipeline_split or None,
            self.account_for_loss_in_pipeline_split or None,
        )
        if self.num_layers % stages and all(choice is None for choice in said):
            self.pipeline_model_parallel_layout = pipeline_layout(spread_layers(self.num_layers, stages))
        if virtual and pp == 2:
            for name, value in VIRTUAL_STAGES_ON_TWO_RANKS.items():
                setattr(self, name, value)
        leave_out_refused_fusions(self)
        with without_outdated_warnings():
            super().finalize()
        check_settings(self)

    def provide_distributed_model(self, *args: Any, **kwargs: Any) -> list[Any]:
        """This rank's chunks, wrapped, as the host builds them.

        Raises:
            ValueError: hooks have put adapters where they are wrong (`bridge.plugins.megatron_bridge.adapters`).
        """
        models = super().provide_distributed_model(*args, **kwargs)
        check_training(models)
        return models

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """One chunk; rotation frequencies are made on the CPU, as transformers does."""
        model = super().provide(pre_process, post_process, vp_stage)
        frequencies = inverse_frequencies(int(self.kv_channels * self.rotary_percent), self.rotary_base)
        model.rotary_pos_emb.inv_freq = frequencies.to(torch.cuda.current_device())
        return model


def provider_of(config: ModelConfig, params_dtype: torch.dtype) -> MiniMaxM2ModelProvider:
    """The provider of this model on this host, for the caller to set parallel sizes on.

    Raises:
        ValueError: megatron-core has no mixed-precision mode for `params_dtype`.
    """
    arguments = {RENAMED.get(name, name): value for name, value in gpt_model_arguments(config).items()}
    return MiniMaxM2ModelProvider(
        **OFF | transformer_config_fields(config, params_dtype=params_dtype),
        **arguments,
        transformer_layer_spec=minimax_m2_block_spec,
        autocast_dtype=params_dtype,
        should_pad_vocab=True,
        make_vocab_size_divisible_by=1,  # padded only where the tensor-parallel ranks need it
    )
