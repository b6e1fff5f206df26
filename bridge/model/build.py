"""This rank's part of a model in whatever process groups megatron-core has: sizes, stages and padding follow them.

The model is a `GPTModel` or a `HybridModel` (`reference.model_class`). Layers that do not divide over the stages, such
as 62 over 4, 8 or 16, are spread as equally as possible, fewer where the embedding and the head are
(`reference.parallelism.spread_layers`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.model.config import gpt_model_arguments, hybrid_model_arguments, transformer_config
from bridge.model.gradient_accumulation import build_accumulating
from bridge.model.layer_spec import Backend, minimax_m2_block_spec, minimax_m2_hybrid_spec
from bridge.model.process_groups import group_sizes
from bridge.model.sorted_chunks import leave_sorted
from reference.config import ModelConfig
from reference.model_class import DEFAULT_MODEL, ModelClass
from reference.parallelism import Parallelism, hybrid_layer_pattern, padded_vocab_size, spread_layers
from reference.rope import inverse_frequencies

MakeSpec = Callable[[TransformerConfig, int | None], Any]
"""(config, virtual stage) -> `GPTModel`'s `transformer_layer_spec`, or `HybridModel`'s `hybrid_stack_spec`."""


def group_parallelism(
    config: ModelConfig, *, layers_per_stage: tuple[int, ...] | None = None, vocab_divisor: int = 1
) -> Parallelism:
    """The layout that megatron-core's process groups give a model; without `layers_per_stage` they are spread.

    Raises:
        ValueError: the model does not divide by the parallel sizes.
    """
    sizes = group_sizes(parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1)
    stages = layers_per_stage or spread_layers(config.num_hidden_layers, sizes["pp"] * sizes["vpp"])
    parallelism = Parallelism(**sizes, layers_per_stage=stages, vocab_divisor=vocab_divisor)
    parallelism.check(config)
    return parallelism


def build_model(
    config: ModelConfig,
    *,
    model: ModelClass | str = DEFAULT_MODEL,
    params_dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
    spec: MakeSpec | None = None,
    layers_per_stage: tuple[int, ...] | None = None,
    vocab_divisor: int = 1,
    **overrides: Any,
) -> GPTModel | HybridModel | list[GPTModel] | list[HybridModel]:
    """This rank's chunk, or the list of its chunks where megatron-core has virtual pipeline stages.

    Args:
        config: the model.
        model: megatron-core's class, "gpt" or "hybrid".
        params_dtype: the parameters' dtype.
        backend: the layer spec's (`bridge.model.layer_spec.default_backend` if None).
        spec: makes the layers; None for MiniMax-M2's.
        layers_per_stage: layers of each stage in model order; None spreads them.
        vocab_divisor: the vocabulary is filled up to a multiple of this times tensor-parallel ranks.
        overrides: `TransformerConfig` fields.

    Raises:
        ValueError: the model does not divide by the parallel sizes, `model` is no class, or `overrides` do not work
            together (`bridge.model.safe_settings`).
    """
    parallelism = group_parallelism(config, layers_per_stage=layers_per_stage, vocab_divisor=vocab_divisor)
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    build, stages = _BUILDERS[ModelClass(model)]
    settings = {
        **parallel_settings(parallelism),
        "virtual_pipeline_model_parallel_size": virtual,
        **stages(config, parallelism),
    }
    chunks = [
        build(
            config,
            params_dtype=params_dtype,
            backend=backend,
            spec=spec,
            vocab_size=padded_vocab_size(config, parallelism),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            vp_stage=chunk,
            **settings | overrides,
        )
        for chunk in ([None] if virtual is None else range(virtual))
    ]
    return chunks[0] if virtual is None else chunks


def parallel_settings(parallelism: Parallelism) -> dict[str, Any]:
    """`TransformerConfig` fields that follow from the parallel sizes, but for virtual stages."""
    return {
        "tensor_model_parallel_size": parallelism.tp,
        "pipeline_model_parallel_size": parallelism.pp,
        "expert_model_parallel_size": parallelism.ep,
        "expert_tensor_parallel_size": parallelism.expert_tp,
        "context_parallel_size": parallelism.cp,
        "sequence_parallel": parallelism.tp > 1,  # training experts under tensor parallelism needs it
    }


def sizes_of_groups(config: ModelConfig) -> dict[str, Any]:
    """`TransformerConfig` fields that follow from megatron-core's process groups; none where there are none yet.

    Raises:
        ValueError: the model does not divide by the sizes.
    """
    if not parallel_state.model_parallel_is_initialized():
        return {}
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return parallel_settings(group_parallelism(config)) | {"virtual_pipeline_model_parallel_size": virtual}


def _gpt_stages(config: ModelConfig, parallelism: Parallelism) -> dict[str, Any]:
    """As megatron-core's `pipeline_model_parallel_layout` wants them, where they are uneven."""
    if len({len(layers) for layers in parallelism.stages(config)}) == 1:
        return {}
    return {"pipeline_model_parallel_layout": pipeline_layout([len(layers) for layers in parallelism.stages(config)])}


def pipeline_layout(layers_per_stage: Sequence[int]) -> list[list[str]]:
    """A `TransformerConfig`'s `pipeline_model_parallel_layout`: what each stage, in model order, is made of."""
    stages = [["decoder"] * layers for layers in layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _hybrid_stages(config: ModelConfig, parallelism: Parallelism) -> dict[str, Any]:
    return {"pattern": hybrid_layer_pattern(config, parallelism)}


def build_gpt_model(
    config: ModelConfig,
    *,
    params_dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
    spec: MakeSpec | None = None,
    vocab_size: int | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    **overrides: Any,
) -> GPTModel:
    """This rank's part of the model, on the current CUDA device or else on the CPU.

    Call it inside `bridge.model.process_groups.model_parallel()`, or in a trainer that has set up megatron-core.
    `perform_initialization=False` among the `overrides` saves time where a checkpoint is loaded next. `vocab_size` is
    the padded vocabulary's, where embedding and head are to have more rows than there are tokens.
    """
    megatron = transformer_config(config, model=ModelClass.GPT, params_dtype=params_dtype, backend=backend, **overrides)
    arguments = gpt_model_arguments(config)
    if vocab_size is not None:
        arguments["vocab_size"] = vocab_size
    block: Any = (  # GPTModel takes it, its signature does not
        minimax_m2_block_spec(megatron, backend, vp_stage=vp_stage) if spec is None else spec(megatron, vp_stage)
    )
    model = build_accumulating(
        GPTModel,
        megatron,
        transformer_layer_spec=block,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        **arguments,
    )
    leave_sorted(model)
    return with_frequencies_of_transformers(model, config)


def build_hybrid_model(
    config: ModelConfig,
    *,
    params_dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
    spec: MakeSpec | None = None,
    vocab_size: int | None = None,
    pattern: str | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    **overrides: Any,
) -> HybridModel:
    """As `build_gpt_model`; `pattern` is the `hybrid_layer_pattern`, where the layers are not to be spread."""
    megatron = transformer_config(
        config, model=ModelClass.HYBRID, params_dtype=params_dtype, backend=backend, **overrides
    )
    arguments = hybrid_model_arguments(config, megatron)
    chosen = {"vocab_size": vocab_size, "hybrid_layer_pattern": pattern}
    model = build_accumulating(
        HybridModel,
        megatron,
        hybrid_stack_spec=minimax_m2_hybrid_spec(megatron, backend) if spec is None else spec(megatron, vp_stage),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        **arguments | {name: value for name, value in chosen.items() if value is not None},
    )
    leave_sorted(model)
    return with_frequencies_of_transformers(model, config)


def with_frequencies_of_transformers[Model: (GPTModel, HybridModel)](model: Model, config: ModelConfig) -> Model:
    """Rotation frequencies made on the CPU, as transformers does: CUDA's power function differs in the last bit."""
    inv_freq = inverse_frequencies(config.rotary_dim, config.rope_theta)
    model.rotary_pos_emb.inv_freq = inv_freq.to(torch.cuda.current_device())
    return model


# How a chunk is built, and what says which layers are in it.
_BUILDERS: dict[ModelClass, tuple[Callable[..., Any], Callable[[ModelConfig, Parallelism], dict[str, Any]]]] = {
    ModelClass.GPT: (build_gpt_model, _gpt_stages),
    ModelClass.HYBRID: (build_hybrid_model, _hybrid_stages),
}
