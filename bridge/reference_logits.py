"""The reference model's logits for a checkpoint, one layer in memory at a time."""

import torch
from torch import Tensor

from bridge.minimax_m2_bridge import MiniMaxM2Bridge
from bridge.progress import Track, untracked
from reference.checkpoint import SCALE_SUFFIX
from reference.model import decoder_layer, embed, head


@torch.no_grad()
def reference_logits(
    bridge: MiniMaxM2Bridge,
    tokens: Tensor,
    *,
    weight_dtype: torch.dtype,
    compute_dtypes: tuple[torch.dtype, ...],
    track: Track = untracked,
) -> list[Tensor]:
    """Logits of `tokens` [batch, seq], once for each of `compute_dtypes`, all on the same weights.

    Weights are dequantised to `weight_dtype`. Equals `reference.model.forward` on the whole dictionary of weights.
    """
    prefixes = ["model.embed_tokens.", *(f"model.layers.{i}." for i in range(bridge.config.num_hidden_layers))]
    streams: list[Tensor] = []
    for prefix in track(prefixes, "reference", len(prefixes)):
        weights = _weights_below(bridge, prefix, weight_dtype)
        if not streams:
            streams = [embed(weights, tokens).to(dtype) for dtype in compute_dtypes]
        else:
            local = {name.removeprefix(prefix): weight for name, weight in weights.items()}
            streams = [decoder_layer(hidden, local, bridge.config) for hidden in streams]
    ends = {name: bridge.read_weight(name, dtype=weight_dtype) for name in ("model.norm.weight", "lm_head.weight")}
    return [head(ends, hidden, bridge.config) for hidden in streams]


def _weights_below(bridge: MiniMaxM2Bridge, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    names = [name for name in bridge.checkpoint.tensors if name.startswith(prefix)]
    return {name: bridge.read_weight(name, dtype=dtype) for name in names if not name.endswith(SCALE_SUFFIX)}
