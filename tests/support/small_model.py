"""A small model that has every part of MiniMax-M2, on the GPU where there is one, and what it says of some tokens."""

import torch
from torch import Tensor

from reference.config import ModelConfig

SMALL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=32,
    vocab_size=64,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    intermediate_size=24,
    num_local_experts=4,
    num_experts_per_tok=2,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = torch.randint(0, SMALL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Of whole sequences, in evaluation mode."""
    positions = torch.arange(tokens.shape[1], device=DEVICE).expand_as(tokens)
    return model.eval()(tokens, positions, None)
