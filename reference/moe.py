"""The mixture of experts: sigmoid router with a correction bias, SwiGLU experts, balancing loss, bias update.

The router computes in float32 or wider: its weight and bias are float32 in the checkpoint, and the hidden state is
converted. The bias decides, with the scores, which experts are chosen, and nothing else; the experts' outputs are mixed
with the unbiased scores of the chosen ones, normalised to sum 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reference.attention import linear
from reference.config import ModelConfig
from reference.norm import compute_dtype


class Routing(NamedTuple):
    """Where each token goes: `experts` and `weights` are [tokens, top_k], `logits` is [tokens, experts]."""

    experts: Tensor
    weights: Tensor
    logits: Tensor


def route(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "experts hidden"],
    bias: Float[Tensor, " experts"],
    *,
    top_k: int,
) -> Routing:
    """scores = sigmoid(x W^T); choose the top k of scores + bias; weights = chosen scores / their sum.

    Source: `transformers` minimax_m2: MiniMaxM2TopKRouter.
    """
    wide = torch.promote_types(compute_dtype(hidden.dtype), weight.dtype)
    logits = hidden.to(wide) @ weight.to(wide).T
    scores = logits.sigmoid()
    experts = (scores + bias.to(wide)).topk(top_k, -1).indices
    chosen = scores.gather(-1, experts)
    return Routing(experts, chosen / chosen.sum(-1, keepdim=True), logits)


def expert(
    x: Float[Tensor, "tokens hidden"],
    w1: Float[Tensor, "width hidden"],
    w3: Float[Tensor, "width hidden"],
    w2: Float[Tensor, "hidden width"],
) -> Float[Tensor, "tokens hidden"]:
    """SwiGLU: (silu(x w1^T) * (x w3^T)) w2^T.

    Source: `transformers` minimax_m2: MiniMaxM2Experts (w1 and w3 are the halves of gate_up_proj, w2 is down_proj).
    """
    return linear(F.silu(linear(x, w1)) * linear(x, w3), w2)


class MoeParts(NamedTuple):
    """The functions that the experts' block is made of: replace one to try another law."""

    route: Callable[..., Routing] = route
    expert: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = expert


MOE_PARTS = MoeParts()  # MiniMax-M2's


def moe_block(
    hidden: Float[Tensor, "seq batch hidden"],
    weights: dict[str, Tensor],
    config: ModelConfig,
    *,
    parts: MoeParts = MOE_PARTS,
) -> Float[Tensor, "seq batch hidden"]:
    """Sum over each token's chosen experts of routing weight x expert(token).

    Source: `transformers` minimax_m2: MiniMaxM2SparseMoeBlock.

    Args:
        hidden: the normed residual stream.
        weights: `gate.weight`, `e_score_correction_bias` and, for each expert e, `experts.{e}.w1.weight`, `w3`, `w2`.
        config: the model's sizes.
        parts: the functions to use.
    """
    tokens = hidden.flatten(0, 1)
    routing = parts.route(
        tokens, weights["gate.weight"], weights["e_score_correction_bias"], top_k=config.num_experts_per_tok
    )
    mixed = torch.zeros_like(tokens, dtype=compute_dtype(hidden.dtype))
    for e in routing.experts.unique().tolist():
        token, slot = torch.where(routing.experts == e)
        out = parts.expert(tokens[token], *(weights[f"experts.{e}.{part}.weight"] for part in ("w1", "w3", "w2")))
        mixed = mixed.index_add(0, token, out.to(mixed.dtype) * routing.weights[token, slot, None].to(mixed.dtype))
    return mixed.to(hidden.dtype).view(hidden.shape)


def tokens_per_expert(experts: Int[Tensor, "tokens top_k"], num_experts: int) -> Int[Tensor, " {num_experts}"]:
    """How many tokens chose each expert."""
    return torch.bincount(experts.flatten(), minlength=num_experts)


def load_balancing_loss(
    logits: Float[Tensor, "tokens experts"], *, top_k: int, coefficient: float
) -> Float[Tensor, ""]:
    """coefficient * E * sum over experts of f_e P_e, as megatron-core computes it for a sigmoid router.

    E is the number of experts. P_e is the mean over tokens of sigmoid(logit_e) / sum of the token's sigmoids; f_e is
    the share of all tokens' top_k choices that fall on e, where experts are chosen by *unbiased* score: megatron-core
    leaves the correction bias out of this loss. The gradient flows through P only.
    Source: megatron-core moe_utils: compute_routing_scores_for_aux_loss, switch_load_balancing_loss_func. It is not the
    softmax loss of `transformers`' load_balancing_loss_func.
    """
    tokens, experts = logits.shape
    scores = logits.to(compute_dtype(logits.dtype)).sigmoid()
    scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    counts = tokens_per_expert(scores.topk(top_k, -1).indices, experts)
    return (scores.sum(0) * counts).sum() * (experts * coefficient / (top_k * tokens * tokens))


def update_expert_bias(
    bias: Float[Tensor, " experts"], counts: Int[Tensor, " experts"], *, rate: float
) -> Float[Tensor, " experts"]:
    """bias + rate * sign(mean(counts) - counts): experts with less than their share become easier to choose.

    Source: megatron-core moe_utils: get_updated_expert_bias (counts summed over tensor, context and data parallel
    ranks); arXiv 2408.15664.
    """
    counts = counts.to(bias.dtype)
    return bias + rate * torch.sign(counts.mean() - counts)
