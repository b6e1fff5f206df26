"""Causal grouped-query attention, and MiniMax-M2's attention block around it.

Activations are [seq, batch, ...], as in megatron-core. Dtypes narrower than float32 are computed in float32, and each
intermediate result (projections, normed heads, rotated heads, attention output) is rounded to the activations' dtype,
as Hugging Face does.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from reference.config import ModelConfig
from reference.norm import compute_dtype, full_dim_rms_norm
from reference.rope import apply_rotary, rotary_tables


def linear(x: Float[Tensor, "*tokens inner"], weight: Float[Tensor, "outer inner"]) -> Float[Tensor, "*tokens outer"]:
    """y = x W^T, summed in float32 at least, rounded to x's dtype."""
    wide = compute_dtype(x.dtype)
    return (x.to(wide) @ weight.to(wide).T).to(x.dtype)


def causal_attention(
    query: Float[Tensor, "seq batch heads head_dim"],
    key: Float[Tensor, "seq batch groups head_dim"],
    value: Float[Tensor, "seq batch groups head_dim"],
) -> Float[Tensor, "seq batch heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v over the positions up to each query's own.

    Query head h uses key/value head h // (heads / groups).

    Source: `transformers` minimax_m2: eager_attention_forward.
    """
    seq, _, heads, head_dim = query.shape
    wide = compute_dtype(query.dtype)
    per_group = heads // key.shape[2]
    q = rearrange(query.to(wide), "s b h d -> b h s d")
    k, v = (repeat(x.to(wide), "s b g d -> b (g r) s d", r=per_group) for x in (key, value))
    scores = q @ k.transpose(-1, -2) * head_dim**-0.5
    future = torch.ones(seq, seq, dtype=torch.bool, device=query.device).triu(1)
    probs = scores.masked_fill(future, float("-inf")).softmax(-1)
    return rearrange(probs @ v, "b h s d -> s b h d").to(query.dtype)


class Heads(NamedTuple):
    """Queries [seq, batch, heads, head_dim] and keys [seq, batch, groups, head_dim]."""

    query: Tensor
    key: Tensor


def norm_and_rotate(
    heads: Heads, weights: dict[str, Tensor], config: ModelConfig, positions: Int[Tensor, " seq"]
) -> Heads:
    """Norm queries and keys over all heads, with `q_norm.weight` and `k_norm.weight`, then rotate them."""
    q = full_dim_rms_norm(heads.query, weights["q_norm.weight"], eps=config.rms_norm_eps)
    k = full_dim_rms_norm(heads.key, weights["k_norm.weight"], eps=config.rms_norm_eps)
    tables = rotary_tables(positions, config.rotary_dim, config.rope_theta, dtype=q.dtype)
    return Heads(apply_rotary(q, *tables), apply_rotary(k, *tables))


class AttentionParts(NamedTuple):
    """The functions that attention is made of, with the signatures of MiniMax-M2's: replace one to try another law."""

    prepare: Callable[[Heads, dict[str, Tensor], ModelConfig, Tensor], Heads] = norm_and_rotate
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention


ATTENTION_PARTS = AttentionParts()  # MiniMax-M2's


def attention_block(
    hidden: Float[Tensor, "seq batch hidden"],
    weights: dict[str, Tensor],
    config: ModelConfig,
    *,
    positions: Int[Tensor, " seq"] | None = None,
    parts: AttentionParts = ATTENTION_PARTS,
) -> Float[Tensor, "seq batch hidden"]:
    """Project to q, k, v; split into heads; norm q and k over all heads; rotate; attend; project back.

    Source: `transformers` minimax_m2: MiniMaxM2Attention.

    Args:
        hidden: the normed residual stream.
        weights: `q_proj.weight`, `k_proj.weight`, `v_proj.weight`, `o_proj.weight`, `q_norm.weight`, `k_norm.weight`.
        config: the model's sizes.
        positions: absolute positions of the tokens; None means 0, 1, 2, ...
        parts: the functions to use.
    """
    if positions is None:
        positions = torch.arange(hidden.shape[0], device=hidden.device)
    q, k, v = (
        rearrange(linear(hidden, weights[f"{name}_proj.weight"]), "s b (h d) -> s b h d", d=config.head_dim)
        for name in "qkv"
    )
    q, k = parts.prepare(Heads(q, k), weights, config, positions)
    context = parts.attend(q, k, v)
    return linear(context.flatten(-2), weights["o_proj.weight"])
