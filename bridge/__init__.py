"""The bridge: MiniMax-M2 checkpoints between Hugging Face and megatron-core, and the layer spec that runs them.

`bridge.MiniMaxM2Bridge` loads on first use, because megatron-core takes seconds to import and `minimax-m2 inspect` does
not need it.
"""

from typing import Any

__all__ = ["MiniMaxM2Bridge"]


def __getattr__(name: str) -> Any:
    if name == "MiniMaxM2Bridge":
        from bridge.minimax_m2_bridge import MiniMaxM2Bridge

        return MiniMaxM2Bridge
    raise AttributeError(f"module 'bridge' has no attribute {name!r}")
