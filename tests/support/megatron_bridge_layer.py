"""megatron-bridge's own MiniMax-M2 layer spec, on a host without Transformer Engine.

Its module is read from its file, because the package imports Transformer Engine. Its function starts from
megatron-core's Transformer Engine layer; on this host it gets the local one from the same place. What it puts in, and
what is judged, is its own: the norms of queries and keys.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.attention import SelfAttention

from support.judged_targets import with_attention

VERSION = "0.6.2"
PROVIDER = "megatron/bridge/models/minimax_m2/minimax_m2_provider.py"


def provider_file() -> Path | None:
    """Where it is installed; None where it is not, or in another version."""
    try:
        found = distribution("megatron-bridge")
    except PackageNotFoundError:
        return None
    file = Path(str(found.locate_file(PROVIDER)))
    return file if found.version == VERSION and file.is_file() else None


def minimax_m2_layer_spec(config: Any) -> Any:
    """What megatron-bridge's function of this name makes."""
    file = provider_file()
    assert file is not None, f"megatron-bridge {VERSION} is not installed"
    name = "megatron_bridge_minimax_m2_provider"
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    provider = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(provider)

    def local_layer(**asked: Any) -> Any:
        assert asked == {"num_experts": config.num_moe_experts, "moe_grouped_gemm": False, "qk_layernorm": True}
        return with_attention(config, SelfAttention)

    with patch.object(gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", local_layer):
        return provider.minimax_m2_layer_spec(config)
