"""A `ModelConfig` as megatron-core's configuration, for `GPTModel` and for `HybridModel`.

Every choice is a row of a table: what carries over under another name, what is the same for every MiniMax-M2, what
follows from the dtype, and what differs between hosts with and without a GPU. Parallelism, recomputation and the like
are the caller's, as keyword arguments; they win over the tables.
"""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from math import nextafter
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.model.architecture import SIZES, check_sizes
from bridge.model.fusions import CROSS_ENTROPY, MODEL_DEFAULTS, chosen_settings
from bridge.model.layer_spec import Backend, default_backend
from bridge.model.safe_settings import REFUSALS, VIRTUAL_STAGES_ON_TWO_RANKS, check_settings
from reference.config import ModelConfig
from reference.model_class import DEFAULT_MODEL, ModelClass
from reference.parallelism import Parallelism, hybrid_layer_pattern, spread_layers

# What every MiniMax-M2 has, also where megatron-core's default happens to say the same.
ARCHITECTURE: dict[str, Any] = {
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "rotary_interleaved": False,
    "attention_softmax_in_fp32": True,
    "apply_query_key_layer_scaling": False,
    "moe_layer_freq": 1,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_shared_expert_intermediate_size": None,
}

BACKEND_SETTINGS: dict[Backend, dict[str, Any]] = {
    "transformer_engine": {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True},
    "local": {"transformer_impl": "local"},
}

# What a HybridModel has besides twice as many layers: its initialisation is that of GPTModel with this.
HYBRID_SETTINGS: dict[str, Any] = {"is_hybrid_model": True}

# megatron-core's softmax goes to float32 only where these flags say that its input is 16 bits wide.
DTYPE_FLAGS: dict[torch.dtype, dict[str, bool]] = {
    torch.float32: {},
    torch.bfloat16: {"bf16": True},
    torch.float16: {"fp16": True},
}

GPU_SETTINGS: dict[str, Any] = {
    "moe_token_dispatcher_type": "alltoall",
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
}

CPU_OVERRIDES: dict[str, Any] = {
    "use_cpu_initialization": True,
    "moe_token_dispatcher_type": "allgather",  # of cut experts alltoall gathers unequal parts, gloo none
    "bias_activation_fusion": False,  # the fusions compile at their first call
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,  # a CUDA extension
}


def transformer_config_fields(
    config: ModelConfig,
    *,
    model: ModelClass | str = DEFAULT_MODEL,
    params_dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
) -> dict[str, Any]:
    """The fields of a `TransformerConfig` for this model on this host, for a host framework's own subclass of it.

    `model` is the class, "gpt" or "hybrid"; `backend` is the layer spec's (`default_backend` of
    `bridge.model.layer_spec` if None).

    Raises:
        ValueError: megatron-core has no mixed-precision mode for `params_dtype`; `model` is neither.
    """
    hybrid = ModelClass(model) is ModelClass.HYBRID
    if params_dtype not in DTYPE_FLAGS:
        raise ValueError(f"params_dtype must be one of {list(DTYPE_FLAGS)}, found {params_dtype}")
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        **ARCHITECTURE,
        **BACKEND_SETTINGS[backend or default_backend()],
        **DTYPE_FLAGS[params_dtype],
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        **(GPU_SETTINGS if torch.cuda.is_available() else CPU_OVERRIDES),
        **default_fusions(backend or default_backend(), params_dtype),
        **(HYBRID_SETTINGS | {"num_layers": 2 * config.num_hidden_layers} if hybrid else {}),
    }


def default_fusions(backend: Backend, params_dtype: torch.dtype) -> dict[str, Any]:
    """Settings of the fused kernels that are the fastest: on a GPU, in bfloat16, in which alone that is recorded."""
    recorded = torch.cuda.is_available() and backend == "transformer_engine" and params_dtype == torch.bfloat16
    return chosen_settings(MODEL_DEFAULTS) if recorded else {}


@contextmanager
def without_outdated_warnings() -> Iterator[None]:
    """megatron-core 0.19 warns of Transformer Engine's cross entropy, also where that is mended.

    `bridge.model.fusions.default_cross_entropy` says since when.
    """
    with warnings.catch_warnings():
        if CROSS_ENTROPY == "cross_entropy_te":
            warnings.filterwarnings("ignore", "Transformer Engine cross entropy loss fusion")
        yield


def leave_out_refused_fusions(config: TransformerConfig, asked: Collection[str] = ()) -> None:
    """Turn off the fused kernels that would be refused beside other settings, and that nobody `asked` for by name."""
    for name, value in chosen_settings(MODEL_DEFAULTS).items():
        refused = any(name in row.model and row.found(config, None) for row in REFUSALS.values())
        if refused and value is True and name not in asked:
            setattr(config, name, False)


def transformer_config(
    config: ModelConfig,
    *,
    model: ModelClass | str = DEFAULT_MODEL,
    params_dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
    **overrides: Any,
) -> TransformerConfig:
    """megatron-core's configuration of this model on this host; `overrides` are `TransformerConfig` fields.

    The other arguments are those of `transformer_config_fields`. Virtual stages on two pipeline ranks get the settings
    with which they are right, where `overrides` name no others.

    Raises:
        ValueError: as `transformer_config_fields`; `overrides` contradict `config` or make another model
            (`bridge.model.architecture`), or do not work together (`bridge.model.safe_settings`).
    """
    fields = transformer_config_fields(config, model=model, params_dtype=params_dtype, backend=backend)
    check_sizes(overrides, config)
    with without_outdated_warnings():
        megatron = TransformerConfig(**{**fields, **overrides})
    if megatron.pipeline_model_parallel_size == 2 and megatron.virtual_pipeline_model_parallel_size is not None:
        for name, value in VIRTUAL_STAGES_ON_TWO_RANKS.items():
            setattr(megatron, name, overrides.get(name, value))
    leave_out_refused_fusions(megatron, asked=overrides)
    check_settings(megatron)
    return megatron


def gpt_model_arguments(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `GPTModel` that are not in its `TransformerConfig`."""
    return {
        "vocab_size": config.vocab_size,
        "max_sequence_length": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_percent": _rotary_percent(config.rotary_dim, config.head_dim),
        "rotary_base": config.rope_theta,
        "share_embeddings_and_output_weights": False,
    }


def hybrid_model_arguments(config: ModelConfig, megatron: TransformerConfig) -> dict[str, Any]:
    """The arguments of `HybridModel` that are not in its `TransformerConfig`; the pattern has the pipeline's stages.

    Layers that do not divide over the stages are spread (`reference.parallelism.spread_layers`).
    """
    pp, vpp = megatron.pipeline_model_parallel_size, megatron.virtual_pipeline_model_parallel_size or 1
    stages = Parallelism(pp=pp, vpp=vpp, layers_per_stage=spread_layers(config.num_hidden_layers, pp * vpp))
    return gpt_model_arguments(config) | {"hybrid_layer_pattern": hybrid_layer_pattern(config, stages)}


def _rotary_percent(rotary_dim: int, head_dim: int) -> float:
    """The share whose product with `head_dim`, rounded down by megatron-core, is `rotary_dim` (98 * (2/98) < 2)."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else nextafter(share, 1.0)
