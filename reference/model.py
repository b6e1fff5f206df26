"""The whole model: logits from tokens and a dictionary of weights under their on-disk names.

Weights are dequantised. Activations are [seq, batch, hidden], as in megatron-core; tokens and logits are
[batch, seq, ...], as in `transformers`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reference.attention import ATTENTION_PARTS, AttentionParts, attention_block, linear
from reference.config import ModelConfig
from reference.moe import MOE_PARTS, MoeParts, moe_block
from reference.norm import rms_norm


class Parts(NamedTuple):
    """The functions that the model is made of: replace one to try another law."""

    norm: Callable[..., Tensor] = rms_norm
    attention: AttentionParts = ATTENTION_PARTS
    moe: MoeParts = MOE_PARTS


MODEL_PARTS = Parts()  # MiniMax-M2's


def decoder_layer(
    hidden: Float[Tensor, "seq batch hidden"],
    weights: dict[str, Tensor],
    config: ModelConfig,
    *,
    positions: Int[Tensor, " seq"] | None = None,
    parts: Parts = MODEL_PARTS,
) -> Float[Tensor, "seq batch hidden"]:
    """h = x + attention(norm(x)); y = h + experts(norm(h)).

    `weights` are one layer's, named without the prefix `model.layers.{i}.`, as `layer_weights` gives them.
    Source: `transformers` minimax_m2: MiniMaxM2DecoderLayer.
    """
    eps, attention_weights = config.rms_norm_eps, _below(weights, "self_attn.")
    normed = parts.norm(hidden, weights["input_layernorm.weight"], eps=eps)
    hidden = hidden + attention_block(normed, attention_weights, config, positions=positions, parts=parts.attention)
    normed = parts.norm(hidden, weights["post_attention_layernorm.weight"], eps=eps)
    return hidden + moe_block(normed, _below(weights, "block_sparse_moe."), config, parts=parts.moe)


def layer_weights(weights: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The weights of one layer, without their `model.layers.{layer}.` prefix."""
    return _below(weights, f"model.layers.{layer}.")


def embed(weights: dict[str, Tensor], tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "seq batch hidden"]:
    """Each token's row of `model.embed_tokens.weight`."""
    return F.embedding(tokens, weights["model.embed_tokens.weight"]).transpose(0, 1)


def head(
    weights: dict[str, Tensor],
    hidden: Float[Tensor, "seq batch hidden"],
    config: ModelConfig,
    *,
    parts: Parts = MODEL_PARTS,
) -> Float[Tensor, "batch seq vocab"]:
    """lm_head(norm(hidden)): the final norm and the untied output projection."""
    normed = parts.norm(hidden, weights["model.norm.weight"], eps=config.rms_norm_eps)
    return linear(normed, weights["lm_head.weight"]).transpose(0, 1)


def forward(
    weights: dict[str, Tensor], tokens: Int[Tensor, "batch seq"], config: ModelConfig, *, parts: Parts = MODEL_PARTS
) -> Float[Tensor, "batch seq vocab"]:
    """logits = head(layers(embed(tokens))).

    Source: `transformers` minimax_m2: MiniMaxM2ForCausalLM.
    """
    hidden = embed(weights, tokens)
    for layer in range(config.num_hidden_layers):
        hidden = decoder_layer(hidden, layer_weights(weights, layer), config, parts=parts)
    return head(weights, hidden, config, parts=parts)


def loss(logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Mean over positions of -log softmax(logits)[next token], in nats, float32 at least.

    Source: `transformers` loss_utils: ForCausalLMLoss.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1].to(wide).flatten(0, 1), tokens[:, 1:].flatten())


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
