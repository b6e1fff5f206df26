"""MiniMax-M2 inside megatron-bridge (NVIDIA-NeMo Megatron-Bridge): our layers, loading and export, by one import.

    import bridge.plugins.megatron_bridge
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained("MiniMaxAI/MiniMax-M2").to_megatron_provider()

The import registers a bridge for the architecture `MiniMaxM2ForCausalLM` in place of the host's own; there the last
registration wins. Import it also before a checkpoint that was saved with it is loaded: the checkpoint's
`run_config.yaml` names our provider and our layer spec.

    provider      the host's `GPTModelProvider` with this model's settings
    mapping       the host's mapping registry, made from `reference.weights.TABLE`
    conversion    the registered bridge: loading and export by our own loops, or by the host's where only those fit
    adapters      the host's adapters that are wrong, and refused
    recipes       configurations of training, in the form of the host's recipes
    saving        what the host's writer leaves out: config.json's quantisation, MTP layers
    names         the names that the host's own modules for this model document

The host must find Transformer Engine, without which it cannot be imported.
"""

from bridge.plugins.host import require_host

HOST = "megatron-bridge>=0.6.2,<0.7"
require_host(HOST)

from bridge.plugins.megatron_bridge.conversion import MiniMaxM2Bridge  # noqa: E402  # the host's version is known first
from bridge.plugins.megatron_bridge.mapping import _FullDimQKNormMapping  # noqa: E402
from bridge.plugins.megatron_bridge.names import (  # noqa: E402
    _FP8_BLOCK_SIZE,
    FullDimKNorm,
    FullDimQNorm,
    _dequant_fp8_blockwise,
    _FullDimRMSNorm,
    _get_tp_group,
    minimax_m2_layer_spec,
)
from bridge.plugins.megatron_bridge.provider import MiniMaxM2ModelProvider  # noqa: E402

__all__ = [
    "HOST",
    "_FP8_BLOCK_SIZE",
    "FullDimKNorm",
    "FullDimQNorm",
    "MiniMaxM2Bridge",
    "MiniMaxM2ModelProvider",
    "_FullDimQKNormMapping",
    "_FullDimRMSNorm",
    "_dequant_fp8_blockwise",
    "_get_tp_group",
    "minimax_m2_layer_spec",
]
