"""The reference model's logits for a checkpoint, one layer in memory at a time."""

import torch
from torch import Tensor

from bridge.jobs.progress import Progress, no_progress
from bridge.proof.checkpoint import Checkpoint
from reference.config import ModelConfig
from reference.model import decoder_layer, embed, head
from reference.names import all_names
from reference.weights import Dialect


def random_tokens(config: ModelConfig, *, batch: int = 2, length: int = 64, seed: int = 0) -> Tensor:
    """Uniformly random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def reference_logits(
    checkpoint: Checkpoint,
    tokens: Tensor,
    *,
    weight_dtype: torch.dtype,
    compute_dtypes: tuple[torch.dtype, ...],
    progress: Progress = no_progress,
) -> list[Tensor]:
    """Logits of `tokens` [batch, seq], once for each of `compute_dtypes`, all on the same weights.

    Weights are dequantised to `weight_dtype`. Equals `reference.model.forward` on the whole dictionary of weights.
    """
    names = all_names(checkpoint.config, Dialect.HF_DISK)
    prefixes = ["model.embed_tokens.", *(f"model.layers.{i}." for i in range(checkpoint.config.num_hidden_layers))]
    streams: list[Tensor] = []
    for prefix in progress(prefixes, "reference", len(prefixes)):
        weights = {name: checkpoint.read_weight(name, dtype=weight_dtype) for name in names if name.startswith(prefix)}
        if not streams:
            streams = [embed(weights, tokens).to(dtype) for dtype in compute_dtypes]
        else:
            local = {name.removeprefix(prefix): weight for name, weight in weights.items()}
            streams = [decoder_layer(hidden, local, checkpoint.config) for hidden in streams]
    ends = {name: checkpoint.read_weight(name, dtype=weight_dtype) for name in ("model.norm.weight", "lm_head.weight")}
    return [head(ends, hidden, checkpoint.config) for hidden in streams]
