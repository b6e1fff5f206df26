"""What the judge lets a model compute: a small MiniMax-M2 in which every law makes a difference, and some tokens.

Heads are no power of two and share key heads, no size equals another, the experts' width is off the grid of FP8 blocks,
the bias changes which experts are chosen. Embeddings, queries and keys are so small that a norm's eps shows.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from reference.attention import attention_block
from reference.checkpoint import expected_tensors
from reference.config import ModelConfig
from reference.model import decoder_layer, embed, layer_weights
from reference.moe import route
from reference.norm import rms_norm
from reference.weights import TABLE, Dialect, Layout

CONFIG = ModelConfig(
    num_hidden_layers=2,
    hidden_size=72,
    vocab_size=92,
    num_attention_heads=12,
    num_key_value_heads=2,
    head_dim=20,
    rotary_dim=8,
    intermediate_size=44,
    num_local_experts=6,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.0,
    max_position_embeddings=64,
)
MICROBATCHES, BATCH, SEQ, CANDIDATES = 2, 8, 8, 512
LEARNING_RATE, STEPS = 0.01, 3  # steps whose gradients are looked at: the third is after two of descent
SEED = 5  # every expert has tokens

NORM_STD, BIAS_STD = 0.3, 0.2
# The standard deviation of what a matrix makes of inputs of size 1; 1 where nothing is said.
GAINS = {"embed_tokens": 0.03, "q_proj": 0.03, "k_proj": 0.03, "w1": 2.0, "w2": 2.0}


@dataclass(frozen=True)
class Problem:
    """A model's config and weights, by their names in a checkpoint, and what it is to compute.

    `tokens` and `labels` are [batch, seq]; the batch is in `MICROBATCHES` equal parts, of which each data-parallel rank
    takes its share.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    tokens: Tensor
    labels: Tensor

    def as_dtype(self, dtype: torch.dtype) -> "Problem":
        """Computed in another dtype, with the same values."""
        return replace(self, weights={name: value.to(dtype) for name, value in self.weights.items()})

    def with_heads_alike(self) -> "Problem":
        """Each head's part of a query or key norm's weight is the first's, as where a norm has one head's weights."""
        head_dim, weights = self.config.head_dim, dict(self.weights)
        for name in norm_weights(self.config):
            weights[name] = weights[name][:head_dim].repeat(len(weights[name]) // head_dim)
        return replace(self, weights=weights)


def norm_weights(config: ModelConfig) -> list[str]:
    """The names of the query and key norms' weights."""
    rows = [row for row in TABLE if row.layout in (Layout.QUERY_HEADS, Layout.KEY_HEADS)]
    layers = range(config.num_hidden_layers)
    return [name for layer in layers for row in rows for name in row.format(Dialect.HF_DISK, layer, 0)]


@cache
def problem(dtype: torch.dtype, seed: int = SEED) -> Problem:
    """The judge's, with values that `dtype` has, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: _drawn(name, spec.shape, generator).to(dtype).double() for name, spec in expected_tensors(CONFIG).items()
    }
    sequences = torch.randint(CONFIG.vocab_size, (CANDIDATES, SEQ + 1), generator=generator)
    chosen = sequences[_distance_from_ties(weights, sequences[:, :-1]).topk(BATCH).indices]
    return Problem(CONFIG, weights, chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous())


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith("e_score_correction_bias"):
        return values * BIAS_STD
    if len(shape) == 1:
        return 1 + values * NORM_STD
    gain = next((gain for part, gain in GAINS.items() if f".{part}." in name), 1.0)
    return values * (gain if "embed_tokens" in name else gain * shape[1] ** -0.5)


def _distance_from_ties(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """For each sequence, how far its choice of experts is from a tie: the smallest distance over tokens and layers.

    The choice is a step: where two experts almost tie, rounding flips it, and outputs of different models are compared.
    """
    hidden, distances = embed(weights, tokens), []
    for layer in range(CONFIG.num_hidden_layers):
        local = layer_weights(weights, layer)
        ranked = _choice_scores(hidden, local).sort(-1, descending=True).values
        k = CONFIG.num_experts_per_tok
        distances.append((ranked[..., k - 1] - ranked[..., k]).amin(0))
        hidden = decoder_layer(hidden, local, CONFIG)
    return torch.stack(distances).amin(0)


def _choice_scores(hidden: Tensor, layer: dict[str, Tensor]) -> Tensor:
    """What the top experts are chosen by, [seq, batch, experts]."""
    eps = CONFIG.rms_norm_eps
    attention = {name.removeprefix("self_attn."): value for name, value in layer.items()}
    hidden = hidden + attention_block(rms_norm(hidden, layer["input_layernorm.weight"], eps=eps), attention, CONFIG)
    normed = rms_norm(hidden, layer["post_attention_layernorm.weight"], eps=eps).flatten(0, 1)
    weight, bias = layer["block_sparse_moe.gate.weight"], layer["block_sparse_moe.e_score_correction_bias"]
    logits = route(normed, weight, bias, top_k=CONFIG.num_experts_per_tok).logits
    return (logits.sigmoid() + bias).view(*hidden.shape[:2], -1)
