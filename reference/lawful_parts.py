"""The functions that MiniMax-M2 is made of, under any `Laws`: norms, rotation, attention, router, experts.

Under MiniMax-M2's own laws each computes what its namesake in `reference.norm`, `rope`, `attention`, `moe` does. Where
a law is about tensor-parallel ranks, all ranks are computed here, side by side: each has its heads, its shard of the
norms' weights and, of the sequence, its run of tokens. What a rank leaves out of its backward pass is detached.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from reference.attention import AttentionParts, Heads, causal_attention, linear
from reference.config import ModelConfig
from reference.laws import Laws, NormOver
from reference.model import Parts
from reference.moe import MoeParts, Routing, expert
from reference.norm import AllReduce, compute_dtype, full_dim_rms_norm
from reference.rope import apply_rotary, inverse_frequencies


def lawful_parts(laws: Laws, config: ModelConfig, *, tensor_parallel: int = 1) -> Parts:
    """The functions for `reference.model.forward`, under these laws on that many ranks."""
    return Parts(
        norm=partial(hidden_norm, laws=laws, ranks=tensor_parallel),
        attention=AttentionParts(
            prepare=partial(prepare_heads, laws=laws, ranks=tensor_parallel),
            attend=partial(attend, laws=laws, config=config, ranks=tensor_parallel),
        ),
        moe=MoeParts(
            route=partial(route_tokens, laws=laws, ranks=tensor_parallel),
            expert=gelu_expert if laws.activation == "gelu" else expert,
        ),
    )


# --- Norms. ---


def hidden_norm(
    x: Float[Tensor, "seq batch hidden"], weight: Float[Tensor, " hidden"], *, eps: float, laws: Laws, ranks: int
) -> Float[Tensor, "seq batch hidden"]:
    """A norm of the residual stream; `ranks` share the sequence."""
    weight = weight + 1 if laws.hidden_gamma == "weight_plus_one" else weight
    eps = eps if laws.hidden_eps is None else laws.hidden_eps
    norm = partial(_norm, eps=eps, outside=laws.hidden_eps_place == "outside_root")
    own = x.shape[0] // ranks
    tokens, weights = x[:, :, None], (weight, weight.detach())  # one "head" of all channels
    if laws.hidden_weight_gradient == "first_rank":
        return torch.cat([norm(run, w) for run, w in zip((tokens[:own], tokens[own:]), weights, strict=True)]).squeeze(
            2
        )
    return norm(tokens, weight).squeeze(2)


def norm_heads(heads: Heads, weights: dict[str, Tensor], *, eps: float, laws: Laws, ranks: int) -> Heads:
    """The norms of queries and keys on all ranks; with more ranks than key heads, the keys come back once a rank."""
    eps = eps if laws.qk_eps is None else laws.qk_eps
    query, key, q_weight, k_weight = *heads, weights["q_norm.weight"], weights["k_norm.weight"]
    replicas = max(ranks // key.shape[2], 1)
    if replicas > 1:
        key, k_weight = key.repeat_interleave(replicas, 2), _replicated(k_weight, key.shape[2], replicas, laws)
    if laws.qk_norm_weights == "key_first":
        q_weight, k_weight = _exchanged(q_weight, k_weight, ranks)
    if laws.qk_gamma == "weight_plus_one":
        q_weight, k_weight = q_weight + 1, k_weight + 1
    return Heads(
        _norm_shards(query, q_weight, laws.q_norm, eps, laws, ranks, 1),
        _norm_shards(key, k_weight, laws.k_norm, eps, laws, ranks, replicas),
    )


def _replicated(weight: Tensor, heads: int, replicas: int, laws: Laws) -> Tensor:
    """Each head's weights once for every rank that holds it, with that rank's part in the gradient."""
    parts = {
        "summed": [1.0] * replicas,
        "averaged": [1 / replicas] * replicas,
        "first": [1.0] + [0.0] * (replicas - 1),
    }[laws.key_replicas]
    shards = weight.view(heads, -1)
    copies = [part * shards + (1 - part) * shards.detach() for part in parts]
    return torch.stack(copies, 1).flatten()


def _exchanged(q_weight: Tensor, k_weight: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """On each rank [q; k] read as [k; q]."""
    joined = [torch.cat(pair) for pair in zip(q_weight.chunk(ranks), k_weight.chunk(ranks), strict=True)]
    keys = k_weight.shape[0] // ranks
    return torch.cat([both[keys:] for both in joined]), torch.cat([both[:keys] for both in joined])


def _norm_shards(
    x: Tensor, weight: Tensor, over: NormOver, eps: float, laws: Laws, ranks: int, replicas: int
) -> Tensor:
    """Each shard of heads, of a rank or a single one, by itself or with the squares of all of them."""
    if over == "nothing":
        return x
    shards = x.shape[2] if over == "each_head" else ranks
    xs, weights = x.chunk(shards, 2), weight.chunk(shards)
    norm = partial(_norm, eps=eps, outside=laws.qk_eps_place == "outside_root")
    if over == "each_head" or laws.qk_square_sum == "own_rank":
        return torch.cat([norm(shard, w) for shard, w in zip(xs, weights, strict=True)], 2)
    squares = x.flatten(-2).to(compute_dtype(x.dtype)).square().sum(-1, keepdim=True)

    def all_reduce(own: Tensor) -> Tensor:
        return squares if laws.qk_backward_sum == "all_ranks" else squares.detach() + own - own.detach()

    law = {"global_dim": weight.shape[0] // replicas, "replicas": replicas, "all_reduce": all_reduce}
    return torch.cat([norm(shard, w, **law) for shard, w in zip(xs, weights, strict=True)], 2)


def _norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    outside: bool,
    global_dim: int | None = None,
    replicas: int = 1,
    all_reduce: AllReduce = lambda own: own,
) -> Tensor:
    """`full_dim_rms_norm`; with eps outside of the root r = 1 / (sqrt(S/N) + eps), as a root of another S."""
    channels = (global_dim or weight.shape[0]) * replicas

    def moved(own: Tensor) -> Tensor:
        return channels * ((all_reduce(own) / channels).sqrt() + eps).square()

    law = {"global_dim": global_dim, "replicas": replicas}
    if outside:
        return full_dim_rms_norm(x, weight, eps=0.0, all_reduce=moved, **law)
    return full_dim_rms_norm(x, weight, eps=eps, all_reduce=all_reduce, **law)


# --- Rotation and attention. ---


def prepare_heads(
    heads: Heads,
    weights: dict[str, Tensor],
    config: ModelConfig,
    positions: Int[Tensor, " seq"],
    *,
    laws: Laws,
    ranks: int,
) -> Heads:
    """`reference.attention.norm_and_rotate` under these laws."""
    norm = partial(norm_heads, weights=weights, eps=config.rms_norm_eps, laws=laws, ranks=ranks)
    if laws.qk_norm_place == "after_rope":
        return norm(Heads(*(rotate(x, config, positions, laws=laws) for x in heads)))
    return Heads(*(rotate(x, config, positions, laws=laws) for x in norm(heads)))


def rotate(
    x: Float[Tensor, "seq batch heads head_dim"], config: ModelConfig, positions: Int[Tensor, " seq"], *, laws: Laws
) -> Float[Tensor, "seq batch heads head_dim"]:
    """`reference.rope.apply_rotary` under these laws."""
    if laws.rotary_channels == "none":
        return x
    channels = config.head_dim if laws.rotary_channels == "all" else config.rotary_dim
    exponent = config.head_dim if laws.rotary_exponent == "head_dim" else channels
    theta = config.rope_theta if laws.rope_theta is None else laws.rope_theta
    wide = compute_dtype(x.dtype)
    inv_freq = inverse_frequencies(exponent, theta, dtype=wide)[: channels // 2].to(x.device)
    angles = positions[:, None].to(wide) * inv_freq
    first = config.head_dim - channels if laws.rotary_end == "last" else 0
    kept, turning, rest = x.split([first, channels, config.head_dim - first - channels], -1)
    interleaved = laws.rotary_pairing == "interleaved"
    turning = rearrange(turning, "... (c two) -> ... (two c)", two=2) if interleaved else turning
    turned = apply_rotary(turning, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    turned = rearrange(turned, "... (two c) -> ... (c two)", two=2) if interleaved else turned
    return torch.cat([kept, turned, rest], -1)


def attend(
    query: Float[Tensor, "seq batch heads head_dim"],
    key: Float[Tensor, "seq batch key_heads head_dim"],
    value: Float[Tensor, "seq batch groups head_dim"],
    *,
    laws: Laws,
    config: ModelConfig,
    ranks: int,
) -> Float[Tensor, "seq batch heads head_dim"]:
    """`reference.attention.causal_attention` under these laws; keys may come once a rank (`norm_heads`)."""
    value = value.repeat_interleave(key.shape[2] // value.shape[2], 2)
    if laws.key_heads == "tiled" and key.shape[2] > ranks:
        local, own = key.shape[2] // ranks, torch.arange(query.shape[2] // ranks)
        reads = torch.cat([rank * local + own % local for rank in range(ranks)]).to(key.device)
        key, value = key[:, :, reads], value[:, :, reads]
    divisor = {
        "head_dim": config.head_dim,
        "hidden_per_head": config.hidden_size / config.num_attention_heads,
        "one": 1,
    }
    query = query * (config.head_dim / divisor[laws.attention_scale]) ** 0.5
    return causal_attention(query, key, value) if laws.mask == "causal" else _attend_to_all(query, key, value)


def _attend_to_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (rearrange(x, "s b h d -> b h s d") for x in (query, key, value))
    return rearrange(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), "b h s d -> s b h d")


# --- The router and the experts. ---


def route_tokens(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "experts hidden"],
    bias: Float[Tensor, " experts"],
    *,
    top_k: int,
    laws: Laws,
    ranks: int,
) -> Routing:
    """`reference.moe.route` under these laws; `ranks` share the tokens."""
    wide = torch.promote_types(compute_dtype(hidden.dtype), weight.dtype)
    narrow = torch.bfloat16 if laws.router_dtype == "bfloat16" else wide
    own = hidden.shape[0] // ranks if laws.router_weight_gradient == "first_rank" else hidden.shape[0]
    runs = ((hidden[:own], weight), (hidden[own:], weight.detach()))
    logits = torch.cat([x.to(narrow) @ w.to(narrow).T for x, w in runs]).to(wide)
    scores = logits.softmax(-1) if laws.router_scores == "softmax" else logits.sigmoid()
    biased = scores if laws.router_bias == "nowhere" else scores + bias.to(wide)
    experts = biased.topk(top_k - laws.fewer_experts, -1).indices
    chosen = (biased if laws.router_bias == "choice_and_weights" else scores).gather(-1, experts)
    weights = chosen if laws.router_weights == "scores" else chosen / chosen.sum(-1, keepdim=True)
    return Routing(experts, weights, logits)


def gelu_expert(
    x: Float[Tensor, "tokens hidden"],
    w1: Float[Tensor, "width hidden"],
    w3: Float[Tensor, "width hidden"],
    w2: Float[Tensor, "hidden width"],
) -> Float[Tensor, "tokens hidden"]:
    """`reference.moe.expert` with gelu."""
    return linear(F.gelu(linear(x, w1)) * linear(x, w3), w2)
