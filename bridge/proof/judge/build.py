"""The model of a target: its layers in a `GPTModel` or a `HybridModel`, or what it built itself."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from bridge.model.build import build_model, parallel_settings
from bridge.model.config import gpt_model_arguments, transformer_config
from bridge.model.layer_spec import block_spec_of, minimax_m2_layer_spec
from bridge.model.qk_norm import FullDimKNorm, FullDimQNorm
from bridge.proof.judge.layouts import RunLayout
from bridge.proof.judge.target import Kind, Made, Slot, Target, make, training_arguments
from bridge.proof.judge.training import TRAINING_SETTINGS
from reference.config import ModelConfig
from reference.model_class import ModelClass

SLOTS = {Slot.Q_NORM: "q_layernorm", Slot.K_NORM: "k_layernorm"}  # of megatron-core's attention


class Built(NamedTuple):
    """This rank's chunks, and what the target turned out to be."""

    kind: Kind
    chunks: list[Any]


def build(target: Target, config: ModelConfig, layout: RunLayout, dtype: torch.dtype) -> Built:
    """Build a target's model in megatron-core's process groups.

    Raises:
        TargetError: the target cannot be called, or makes something else; whatever it or megatron-core raises.
    """
    settings = {"params_dtype": dtype, **TRAINING_SETTINGS, **layout.overrides}
    first = transformer_config(config, **parallel_settings(layout.sizes), **settings)
    made = make(target, _offers(first, config))
    if made.kind is Kind.MODEL:
        chunks = unwrap_model(made.value)
        for chunk in chunks:
            for name, value in TRAINING_SETTINGS.items():
                setattr(chunk.config, name, value)
        return Built(made.kind, chunks)
    model = ModelClass.HYBRID if made.kind is Kind.HYBRID else ModelClass.GPT
    spec = partial(_spec, target=target, model_config=config)
    built: Any = build_model(config, model=model, spec=spec, **settings)
    return Built(made.kind, built if isinstance(built, list) else [built])


def _offers(config: TransformerConfig, model_config: ModelConfig, vp_stage: int | None = None) -> dict[str, Any]:
    """What a target's parameters may ask for by name."""
    arguments = gpt_model_arguments(model_config)
    return {
        "config": config,
        "args": training_arguments(config, arguments),
        "vp_stage": vp_stage,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "model_config": model_config,
        "params_dtype": config.params_dtype,
    }


def _spec(config: TransformerConfig, vp_stage: int | None, *, target: Target, model_config: ModelConfig) -> Any:
    """What `GPTModel` or `HybridModel` takes, made anew: a spec may depend on the config and the stage."""
    made = make(target, _offers(config, model_config, vp_stage))
    if made.kind in (Kind.HYBRID, Kind.BLOCK):
        return made.value
    layer = made.value if made.kind is Kind.LAYER else _layer_with(made, config)
    return block_spec_of(layer, config, vp_stage=vp_stage)


def _layer_with(part: Made, config: TransformerConfig) -> ModuleSpec:
    """MiniMax-M2's layer with another part in it; an attention finds the right norms in its slots, if it looks."""
    layer: Any = minimax_m2_layer_spec(config)
    parts = layer.submodules
    if part.slot is Slot.ROUTER:
        experts = replace(parts.mlp.keywords["submodules"], router=part.value)
        parts.mlp = partial(parts.mlp.func, **parts.mlp.keywords | {"submodules": experts})
        return layer
    if part.slot is Slot.ATTENTION and isinstance(part.value, ModuleSpec):
        parts.self_attention = part.value
        return layer
    norms: dict[str, Any] = {"q_layernorm": FullDimQNorm, "k_layernorm": FullDimKNorm}
    attention = parts.self_attention
    attention.module = part.value if part.slot is Slot.ATTENTION else SelfAttention
    if part.slot is not None and part.slot in SLOTS:
        norms[SLOTS[part.slot]] = part.value
    attention.submodules = replace(attention.submodules, **norms)
    return layer
