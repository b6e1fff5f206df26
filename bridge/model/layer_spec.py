"""MiniMax-M2's layer for megatron-core: which modules it is made of, with Transformer Engine and without.

Everything but three modules is megatron-core's own: the attention norms queries and keys over all heads
(`bridge.model.attention`), the router computes in float32 (`bridge.model.router`), and the local spec's norms are
`RMSNorm` below, because megatron-core's refuse sequence parallelism.

    minimax_m2_layer_spec    one layer, for `GPTModel` or any loop that takes a `transformer_layer_spec`
    minimax_m2_block_spec    the layers of a pipeline stage and the final norm, for `GPTModel`
    minimax_m2_hybrid_spec   for `HybridModel`, with the pattern `*E` for each layer
"""

from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

import compiled
from bridge.model.attention import MiniMaxM2SelfAttention
from bridge.model.router import Float32Router
from bridge.model.safe_settings import check_settings

Backend = Literal["transformer_engine", "local"]

LOCAL_TO_CHECKPOINT_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}  # those of Transformer Engine


class RMSNorm(compiled.RMSNorm):
    """`compiled.RMSNorm` as megatron-core builds norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype, sequence_parallel=config.sequence_parallel)
        self.to("cpu" if config.use_cpu_initialization else torch.cuda.current_device())


def default_backend() -> Backend:
    """Transformer Engine where it is installed and a GPU is there, since its modules refuse to be built without one."""
    usable = torch.cuda.is_available() and find_spec("transformer_engine") is not None
    return "transformer_engine" if usable else "local"


def minimax_m2_layer_spec(config: TransformerConfig, backend: Backend | None = None) -> ModuleSpec:
    """One decoder layer, whether `config.qk_layernorm` is on or off.

    Raises:
        ValueError: `backend` is neither None, "transformer_engine" nor "local"; or settings of the config do not work
            together (`bridge.model.safe_settings`).
    """
    check_settings(config)
    modules = _modules(backend)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(**_attention_half(modules), **_expert_half(modules, config)),
    )


def minimax_m2_block_spec(
    config: TransformerConfig, backend: Backend | None = None, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage (and virtual stage), and the final norm.

    Raises:
        ValueError: as `minimax_m2_layer_spec`, also where the stage has no layer.
    """
    return block_spec_of(minimax_m2_layer_spec(config, backend), config, backend, vp_stage=vp_stage)


def block_spec_of(
    layer: ModuleSpec, config: TransformerConfig, backend: Backend | None = None, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """As `minimax_m2_block_spec`, of any layer."""
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=_modules(backend).layer_norm())


def minimax_m2_hybrid_spec(config: TransformerConfig, backend: Backend | None = None) -> ModuleSpec:
    """The stack of a `HybridModel` whose pattern has `*E` for each layer: attention, then experts.

    Raises:
        ValueError: as `minimax_m2_layer_spec`.
    """
    check_settings(config)
    modules = _modules(backend)
    attention = TransformerLayerSubmodules(**_attention_half(modules))
    experts = TransformerLayerSubmodules(**_expert_half(modules, config))
    return ModuleSpec(
        module=MiniMaxM2HybridStack,
        params={"norm": modules.layer_norm()},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=experts),
        ),
    )


class MiniMaxM2HybridStack(HybridStack):
    """`HybridStack` with a final norm of one's choice; megatron-core's own is Transformer Engine's or nothing."""

    def __init__(self, config: TransformerConfig, *args: Any, norm: Any, post_layer_norm: bool = True, **kwargs: Any):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class _LocalModules(LocalSpecProvider):
    """megatron-core's modules without Transformer Engine, with norms that carry sequence parallelism."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm


def _modules(backend: Backend | None) -> BackendSpecProvider:
    backend = backend or default_backend()
    if backend == "local":
        return _LocalModules()
    if backend != "transformer_engine":
        raise ValueError(f"backend must be None, 'transformer_engine' or 'local', found {backend!r}")
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _attention_half(modules: BackendSpecProvider) -> dict[str, Any]:
    """The fields of `TransformerLayerSubmodules` up to the residual after attention."""
    norm_and_qkv = modules.column_parallel_layer_norm_linear()
    attention = SelfAttentionSubmodules(
        linear_qkv=norm_and_qkv or modules.column_parallel_linear(),
        core_attention=modules.core_attention(),
        linear_proj=modules.row_parallel_linear(),
    )
    return {
        "input_layernorm": IdentityOp if norm_and_qkv else modules.layer_norm(),
        "self_attention": ModuleSpec(
            module=MiniMaxM2SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        "self_attn_bda": get_bias_dropout_add,
        "sharded_state_dict_keys_map": {} if norm_and_qkv else LOCAL_TO_CHECKPOINT_KEYS,
    }


def _expert_half(modules: BackendSpecProvider, config: TransformerConfig) -> dict[str, Any]:
    """The fields of `TransformerLayerSubmodules` from the norm before the experts on."""
    experts = modules.grouped_mlp_modules(config.moe_grouped_gemm)
    return {
        "pre_mlp_layernorm": modules.layer_norm(has_residual=True),
        "mlp": partial(MoELayer, submodules=MoESubmodules(router=Float32Router, experts=experts)),
        "mlp_bda": get_bias_dropout_add,
    }
