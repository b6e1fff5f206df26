"""The bridge: MiniMax-M2 checkpoints between Hugging Face and megatron-core, and the layer specs that run them.

The names below are the public ones. Each loads on first use, because megatron-core takes seconds to import and
`minimax-m2 inspect` does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
    from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
    from bridge.minimax_m2_bridge import MiniMaxM2Bridge
    from bridge.model.build import build_model
    from bridge.model.cpu import megatron_on_cpu
    from bridge.model.layer_spec import minimax_m2_block_spec, minimax_m2_hybrid_spec, minimax_m2_layer_spec
    from bridge.model.process_groups import model_parallel
    from bridge.model.qk_norm import FullDimKNorm, FullDimQNorm
    from bridge.model.safe_settings import check_settings
    from bridge.proof.compare import compare_checkpoints

_HOMES = {
    "MiniMaxM2Bridge": "bridge.minimax_m2_bridge",
    "build_model": "bridge.model.build",
    "megatron_on_cpu": "bridge.model.cpu",
    "minimax_m2_block_spec": "bridge.model.layer_spec",
    "minimax_m2_hybrid_spec": "bridge.model.layer_spec",
    "minimax_m2_layer_spec": "bridge.model.layer_spec",
    "model_parallel": "bridge.model.process_groups",
    "FullDimKNorm": "bridge.model.qk_norm",
    "FullDimQNorm": "bridge.model.qk_norm",
    "check_settings": "bridge.model.safe_settings",
    "ImportJob": "bridge.convert.hf_to_torch_dist",
    "import_checkpoint": "bridge.convert.hf_to_torch_dist",
    "ExportJob": "bridge.convert.torch_dist_to_hf",
    "export_checkpoint": "bridge.convert.torch_dist_to_hf",
    "compare_checkpoints": "bridge.proof.compare",
}

__all__ = [
    "ExportJob",
    "FullDimKNorm",
    "FullDimQNorm",
    "ImportJob",
    "MiniMaxM2Bridge",
    "build_model",
    "check_settings",
    "compare_checkpoints",
    "export_checkpoint",
    "import_checkpoint",
    "megatron_on_cpu",
    "minimax_m2_block_spec",
    "minimax_m2_hybrid_spec",
    "minimax_m2_layer_spec",
    "model_parallel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}")
    try:
        module = import_module(_HOMES[name])
    except AttributeError as error:  # Python would turn this one into "cannot import name", and hide what went wrong
        raise ImportError(f"{_HOMES[name]} cannot be imported: {error}") from error
    return getattr(module, name)
