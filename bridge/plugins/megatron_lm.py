"""MiniMax-M2 in Megatron-LM: what its `--spec` takes, and a `model_provider` for loops that take one.

    pretrain_gpt.py    --spec bridge.plugins.megatron_lm layer_spec         <arguments of the model>
    pretrain_hybrid.py --spec bridge.plugins.megatron_lm hybrid_stack_spec  <arguments of the model>

Megatron-LM takes what `--spec` names as it is, without a call. So both are specs of a module that chooses its parts
when it is built, by the `TransformerConfig` that it is given. It checks that config, and Megatron-LM's arguments where
the process has some, for what MiniMax-M2 needs (`bridge.plugins.megatron_lm_arguments` prints the arguments). Weights
come and go as `torch_dist` checkpoints: `minimax-m2 import` and `minimax-m2 export`.

Megatron-LM's own final norm is used with `layer_spec`, which without Transformer Engine does not take sequence
parallelism; `model_provider` has ours.
"""

import argparse
import sys
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from bridge.model.layer_spec import (
    Backend,
    MiniMaxM2HybridStack,
    minimax_m2_block_spec,
    minimax_m2_hybrid_spec,
    minimax_m2_layer_spec,
)
from bridge.plugins.megatron_lm_arguments import check_arguments, check_config

BACKENDS: dict[str, Backend] = {"transformer_engine": "transformer_engine", "local": "local"}


class MiniMaxM2Layer(TransformerLayer):
    """A decoder layer whose parts the config chooses.

    Raises:
        ValueError: the config, or an argument of Megatron-LM's, is not MiniMax-M2's.
    """

    def __init__(self, config: TransformerConfig, submodules: None = None, **kwargs: Any) -> None:
        spec: Any = minimax_m2_layer_spec(config, checked_backend(config))
        super().__init__(config, spec.submodules, **kwargs)


class MiniMaxM2Stack(MiniMaxM2HybridStack):
    """A hybrid stack whose parts the config chooses.

    Raises:
        ValueError: the config, or an argument of Megatron-LM's, is not MiniMax-M2's.
    """

    def __init__(self, config: TransformerConfig, submodules: None = None, **kwargs: Any) -> None:
        spec: Any = minimax_m2_hybrid_spec(config, checked_backend(config))
        super().__init__(config, spec.submodules, **spec.params, **kwargs)


layer_spec = ModuleSpec(module=MiniMaxM2Layer)
hybrid_stack_spec = ModuleSpec(module=MiniMaxM2Stack)


def checked_backend(config: TransformerConfig) -> Backend:
    """The layer spec's backend that `--transformer-impl` says, of a config that is MiniMax-M2's.

    Raises:
        ValueError: it is not, or `--transformer-impl` is neither.
    """
    arguments = megatron_lm_namespace()
    if arguments is not None:
        check_arguments(arguments)
    check_config(config)
    if config.transformer_impl not in BACKENDS:
        raise ValueError(
            f"--transformer-impl: found {config.transformer_impl!r}, expected 'transformer_engine' or 'local' for "
            "MiniMax-M2; pass one of them"
        )
    return BACKENDS[config.transformer_impl]


def megatron_lm_namespace() -> argparse.Namespace | None:
    """Megatron-LM's parsed arguments; None in a process that is not Megatron-LM's."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    return None if global_vars is None else global_vars._GLOBAL_ARGS


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> GPTModel | HybridModel:
    """One chunk of the model that Megatron-LM's arguments describe; a `HybridModel` with `--hybrid-layer-pattern`.

    Raises:
        ValueError: an argument is not MiniMax-M2's; names the option, the value found, and what to pass.
    """
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    arguments: Any = get_args()  # megatron-core says None
    config = core_transformer_config_from_args(arguments) if config is None else config
    backend = checked_backend(config)
    common = {
        "config": config,
        "vocab_size": arguments.padded_vocab_size,
        "max_sequence_length": arguments.max_position_embeddings,
        "pre_process": pre_process,
        "post_process": post_process,
        "fp16_lm_cross_entropy": arguments.fp16_lm_cross_entropy,
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "rope",
        "rotary_percent": arguments.rotary_percent,
        "rotary_base": arguments.rotary_base,
        "vp_stage": vp_stage,
        "pg_collection": pg_collection,
    }
    if arguments.hybrid_layer_pattern is not None:
        stack = minimax_m2_hybrid_spec(config, backend)
        return HybridModel(hybrid_stack_spec=stack, hybrid_layer_pattern=arguments.hybrid_layer_pattern, **common)
    block: Any = minimax_m2_block_spec(config, backend, vp_stage=vp_stage)
    return GPTModel(transformer_layer_spec=block, **common)
