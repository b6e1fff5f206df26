"""The laws that a MiniMax-M2 must follow, and the wrong ones that implementations are known to follow instead.

`Laws` has one field for each law; its defaults are MiniMax-M2's. `WRONG_LAWS` has one row for each mistake: which
fields it changes, which parts of the model show it, and what to tell whoever made it. `reference.lawful_model` computes
under any of them, and `reference.diagnosis` finds the one that an observed outcome follows.

To add a mistake, add a value (or a field) to `Laws`, what it computes to `reference.lawful_parts` or
`reference.lawful_weights`, and a row to `WRONG_LAWS`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

NormOver = Literal["all_heads", "each_head", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Laws:
    """One choice for each law; the first value of each is MiniMax-M2's.

    `None` for a number means the config's. A "rank" is one of tensor parallelism.
    """

    # The norms of queries and keys, and those of the residual stream (before attention, before the experts, final).
    q_norm: NormOver = "all_heads"
    k_norm: NormOver = "all_heads"
    qk_norm_place: Literal["before_rope", "after_rope"] = "before_rope"
    qk_norm_weights: Literal["query_first", "key_first"] = "query_first"  # of the two vectors, laid end to end
    qk_eps: float | None = None
    qk_eps_place: Literal["inside_root", "outside_root"] = "inside_root"
    qk_gamma: Literal["weight", "weight_plus_one"] = "weight"
    hidden_eps: float | None = None
    hidden_eps_place: Literal["inside_root", "outside_root"] = "inside_root"
    hidden_gamma: Literal["weight", "weight_plus_one"] = "weight"
    # Over tensor-parallel ranks.
    qk_square_sum: Literal["all_ranks", "own_rank"] = "all_ranks"  # S, in the forward pass
    qk_backward_sum: Literal["all_ranks", "own_rank"] = "all_ranks"  # C, in the backward pass
    qk_weight_gradient: Literal["own_heads", "summed_over_ranks", "times_ranks"] = "own_heads"
    key_replicas: Literal["summed", "first", "averaged"] = "summed"  # dw of a key head that several ranks hold
    hidden_weight_gradient: Literal["all_tokens", "first_rank"] = "all_tokens"  # under sequence parallelism
    router_weight_gradient: Literal["all_tokens", "first_rank"] = "all_tokens"
    # Rotary position embedding.
    rotary_channels: Literal["rotary_dim", "all", "none"] = "rotary_dim"
    rotary_end: Literal["first", "last"] = "first"
    rotary_pairing: Literal["half_split", "interleaved"] = "half_split"
    rotary_exponent: Literal["rotary_dim", "head_dim"] = "rotary_dim"  # theta^(-2i / this)
    rope_theta: float | None = None
    # Attention.
    attention_scale: Literal["head_dim", "hidden_per_head", "one"] = "head_dim"  # 1 / sqrt of this
    key_heads: Literal["repeated", "tiled"] = "repeated"  # query head h reads key head h // n, or h % groups
    mask: Literal["causal", "none"] = "causal"
    # The router and the experts.
    router_scores: Literal["sigmoid", "softmax"] = "sigmoid"
    router_bias: Literal["choice", "choice_and_weights", "nowhere"] = "choice"
    router_weights: Literal["normalised", "scores"] = "normalised"
    router_dtype: Literal["float32", "bfloat16"] = "float32"  # or wider
    fewer_experts: int = 0  # than num_experts_per_tok
    activation: Literal["silu", "gelu"] = "silu"
    # How weights are laid out, where several are fused, and stored.
    qkv_rows: Literal["by_group", "read_as_blocks", "stored_as_blocks", "value_before_key"] = "by_group"
    gate_up: Literal["gate_first", "up_first"] = "gate_first"
    expert_shards: Literal["in_order", "reversed", "one_run"] = "in_order"  # over expert-tensor-parallel ranks
    fp8_scales: Literal["float32", "bfloat16"] = "float32"


class Part(StrEnum):
    """What can be judged by itself."""

    NORM = "norm"  # of queries and keys
    ROUTER = "router"
    ATTENTION = "attention"
    MODEL = "model"


class Ranks(StrEnum):
    """Over which ranks something must be divided for a mistake to show."""

    NONE = "none"
    TENSOR = "tensor parallel"
    SHARED_KEYS = "more tensor-parallel ranks than key/value heads"
    EXPERT_TENSOR = "expert-tensor parallel"


# Which parts contain which.
CONTAINS: dict[Part, tuple[Part, ...]] = {
    Part.NORM: (Part.NORM,),
    Part.ROUTER: (Part.ROUTER,),
    Part.ATTENTION: (Part.ATTENTION, Part.NORM),
    Part.MODEL: tuple(Part),
}


@dataclass(frozen=True)
class WrongLaw:
    """A mistake that implementations make.

    Args:
        name: what it is called.
        changes: the fields of `Laws` that it changes, and their values.
        sentence: what the implementation does instead, what follows from it, and what to do.
        scope: the smallest part that shows it; every part that contains this one shows it too (`CONTAINS`).
        ranks: what must be divided over ranks for it to show.
    """

    name: str
    changes: dict[str, Any]
    sentence: str
    scope: Part
    ranks: Ranks = Ranks.NONE
