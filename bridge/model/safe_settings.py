"""Settings that do not work together for this model: what happens, and what to set instead.

megatron-core takes thousands of combinations and checks some. The rows below are those that are silently wrong or that
fail far from their cause, each seen in a run (`bridge/model/README.md` says which). Everything that is given a
`TransformerConfig` calls `check_settings`: the configuration, the layer specs, the attention, the builders. It can be
called with a `DistributedDataParallelConfig` too, which a model never sees: a training loop calls it before it wraps.

A row is data: the settings that must all be so, and the settings with which it works.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.model.architecture import check_architecture

Condition = Callable[[Any], object]
"""Of a setting's value: whether it is one of those that a row is about."""


def on(value: Any) -> bool:
    """Anything but off: False, None, 0, "none" and nothing in a list."""
    return bool(value) and value != "none"


def off(value: Any) -> bool:
    """The opposite of `on`."""
    return not on(value)


def _any_on(values: Any) -> bool:
    """`on` of a value, or of one in a list."""
    return any(map(on, values)) if isinstance(values, list | tuple) else on(values)


class Refusal(NamedTuple):
    """Settings that are refused together."""

    status: Literal["wrong", "broken"]
    """Wrong: it trains, and losses or gradients are not the model's. Broken: an error, a hang or NaN."""
    happens: str
    instead: Mapping[str, Any]
    """Settings with which it works, in place of those."""
    model: Mapping[str, Condition]
    """Fields of `TransformerConfig`."""
    ddp: Mapping[str, Condition] = {}
    """Fields of `DistributedDataParallelConfig`."""

    def found(self, config: TransformerConfig, ddp: DistributedDataParallelConfig | None) -> dict[str, Any] | None:
        """The settings that are refused, with their values; None if they are not all so."""
        if self.ddp and ddp is None:
            return None
        pairs = [(config, self.model), (ddp, self.ddp)]
        values = {
            name: (getattr(side, name), condition)
            for side, conditions in pairs
            for name, condition in conditions.items()
        }
        if not all(condition(value) for value, condition in values.values()):
            return None
        return {name: value for name, (value, _) in values.items()}


def _bypasses_the_norm(field: str) -> Refusal:
    happens = "queries and keys go another way than through the norm over all heads, which MiniMax-M2 has"
    return Refusal("wrong", happens, {field: False}, {field: on})


# megatron-core's default, no overlap, is wrong on two pipeline ranks with virtual stages; `transformer_config` chooses
# these.
VIRTUAL_STAGES_ON_TWO_RANKS = {"overlap_p2p_comm": True, "batch_p2p_comm": False}

REFUSALS: dict[str, Refusal] = {
    "virtual stages on two pipeline ranks": Refusal(
        "wrong",
        "the two ranks mix up the messages of their stages, and losses and gradients are wrong without an error",
        VIRTUAL_STAGES_ON_TWO_RANKS,
        {
            "pipeline_model_parallel_size": lambda size: size == 2,
            "virtual_pipeline_model_parallel_size": lambda size: size is not None and size > 1,
            "overlap_p2p_comm": off,
        },
    ),
    "delayed weight gradients": Refusal(
        "broken", "losses are NaN from the second step on", {"delay_wgrad_compute": False}, {"delay_wgrad_compute": on}
    ),
    "FP8 parameters": Refusal(
        "broken",
        "parameters that are stored as FP8 can be neither loaded from a checkpoint nor exported",
        {"fp8_param": False},
        {"fp8_param": on},
    ),
    "Megatron-FSDP": Refusal(
        "wrong",
        "the gradient norm is above that of the other ways to shard (1.3 % on two ranks), so clipping is another, and "
        "its DTensor parameters can be neither loaded nor exported",
        {"use_megatron_fsdp": False, "use_distributed_optimizer": True},
        {},
        {"use_megatron_fsdp": on},
    ),
    "MTP layers": Refusal(
        "broken",
        "the model has no multi-token prediction layers (a checkpoint's are carried along), and the loss asks for them",
        {"mtp_num_layers": None},
        {"mtp_num_layers": on},
    ),
    "experts in chunks, load-balancing loss": Refusal(
        "wrong",
        "each chunk of a sequence adds a load-balancing loss of its own, which is so counted about as often",
        {"mlp_chunks_for_training": 1},
        {"mlp_chunks_for_training": lambda chunks: chunks > 1, "moe_aux_loss_coeff": _any_on},
    ),
    "experts in chunks, z-loss": Refusal(
        "wrong",
        "each chunk of a sequence adds a z-loss of its own, which is so counted about as often",
        {"mlp_chunks_for_training": 1},
        {"mlp_chunks_for_training": lambda chunks: chunks > 1, "moe_z_loss_coeff": on},
    ),
    "meta device": Refusal(
        "broken",
        "Transformer Engine makes its parameters without values, and only Megatron-FSDP would give them some",
        {"init_model_with_meta_device": False},
        {"init_model_with_meta_device": on},
    ),
    "operation fuser": Refusal(
        "broken",
        "megatron-core's experts refuse it with an assertion: their fused form is for GPUs with CuTe kernels",
        {"use_transformer_engine_op_fuser": False},
        {"use_transformer_engine_op_fuser": on},
    ),
    "gradient accumulation of local layers": Refusal(
        "broken",
        "megatron-core's own layers need an extension of APEX for it, which is not installed",
        {"gradient_accumulation_fusion": False},
        {
            "gradient_accumulation_fusion": on,
            "transformer_impl": lambda kind: kind == "local" and not layers._grad_accum_fusion_available,
        },
    ),
    "compiled cross entropy of other dtypes": Refusal(
        "wrong",
        "the gradient of the logits is rounded to bfloat16, whatever dtype they have",
        {"cross_entropy_loss_fusion": False},
        {
            "cross_entropy_loss_fusion": on,
            "cross_entropy_fusion_impl": lambda kind: kind == "native",
            "params_dtype": lambda dtype: dtype is not torch.bfloat16,
        },
    ),
    "Transformer Engine's cross entropy of float16": Refusal(
        "broken",
        "an error at the first loss: its kernels are for bfloat16 and float32",
        {"cross_entropy_loss_fusion": False},
        {
            "cross_entropy_loss_fusion": on,
            "cross_entropy_fusion_impl": lambda kind: kind == "te",
            "params_dtype": lambda dtype: dtype is torch.float16,
        },
    ),
    "fused router, routing replay": Refusal(
        "wrong",
        "the fused router chooses experts anew, and those that were recorded are not replayed",
        {"moe_router_fusion": False},
        {"moe_router_fusion": on, "moe_enable_routing_replay": on},
    ),
    "fused router, quantile balancing": Refusal(
        "broken",
        "megatron-core's router refuses it with an assertion",
        {"moe_router_fusion": False},
        {
            "moe_router_fusion": on,
            "moe_router_load_balancing_type": lambda kinds: (
                "quantile_balancing" in ([kinds] if isinstance(kinds, str) else kinds)
            ),
        },
    ),
    "fused permutation, padding to capacity": Refusal(
        "wrong",
        "the fused permutation does not pad an expert's tokens, and experts get those of others",
        {"moe_permute_fusion": False},
        {"moe_permute_fusion": on, "moe_pad_expert_input_to_capacity": on},
    ),
    "local CUDA graphs": Refusal(
        "broken",
        "the capture includes the experts' dispatcher, which waits for the GPU, and that cannot be captured",
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["attn", "moe_router", "moe_preprocess"]},
        {"cuda_graph_impl": lambda kind: kind == "local"},
    ),
    "CUDA graphs, router padding": Refusal(
        "broken",
        "with the router's padding the dispatcher waits for the GPU to count tokens, and that cannot be captured",
        {"cuda_graph_impl": "none"},
        {"cuda_graph_impl": on, "moe_router_padding_for_quantization": on},
    ),
    "CUDA graphs, gathering parameters": Refusal(
        "broken",
        "modules have hooks that gather their parameters, and a module with hooks cannot be captured",
        {"overlap_param_gather": False},
        {"cuda_graph_impl": on},
        {"overlap_param_gather": on},
    ),
    "HybridModel, overlap of experts' communication": Refusal(
        "broken",
        "megatron-core's HybridModel has no build_schedule_plan, which the overlapped schedule calls",
        {"overlap_moe_expert_parallel_comm": False},
        {"is_hybrid_model": on, "overlap_moe_expert_parallel_comm": on},
    ),
    **{name: _bypasses_the_norm(name) for name in ("fused_single_qkv_rope", "attention_output_gate", "qk_l2_norm")},
    "rotary_interleaved": Refusal(
        "wrong",
        "MiniMax-M2 rotates channel i with channel i + rotary_dim / 2, not with its neighbour",
        {"rotary_interleaved": False},
        {"rotary_interleaved": on},
    ),
    "no_rope_freq": Refusal("wrong", "every layer of MiniMax-M2 rotates", {"no_rope_freq": None}, {"no_rope_freq": on}),
}


def check_settings(config: TransformerConfig, ddp: DistributedDataParallelConfig | None = None) -> None:
    """Refuse settings that do not work together for this model; without `ddp`, those of the model alone.

    Raises:
        ValueError: says what was found, what would happen, and what to set instead; also of settings that make another
            model (`bridge.model.architecture`).
    """
    check_architecture(config)
    for refusal in REFUSALS.values():
        found = refusal.found(config, ddp)
        if found is not None:
            raise ValueError(f"{_said(found)}: {refusal.happens}; set {_said(refusal.instead)}")


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
