"""The laws that a MiniMax-M2 must follow, and the wrong ones that implementations are known to follow instead.

`Laws` has one field for each law; its defaults are MiniMax-M2's. `WRONG_LAWS` has one row for each mistake: which
fields it changes, which parts of the model show it, and what to tell whoever made it. `reference.lawful_model` computes
under any of them, and `reference.diagnosis` finds the one that an observed outcome follows.

To add a mistake, add a value (or a field) to `Laws`, what it computes to `reference.lawful_parts` or
`reference.lawful_weights`, and a row to `WRONG_LAWS`.
"""

from dataclasses import dataclass, field
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


MINIMAX_M2 = Laws()


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
    changes: dict[str, Any] = field(hash=False)
    sentence: str
    scope: Part
    ranks: Ranks = Ranks.NONE

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that show it."""
        return tuple(part for part, inside in CONTAINS.items() if self.scope in inside)


def _wrong(name: str, scope: str, sentence: str, *, ranks: Ranks = Ranks.NONE, **changes: Any) -> WrongLaw:
    return WrongLaw(name, changes, sentence, Part(scope), ranks)


_TP, _SHARED, _ETP = Ranks.TENSOR, Ranks.SHARED_KEYS, Ranks.EXPERT_TENSOR
_FULL_NORM = "Use a norm over all heads: bridge.FullDimQNorm and bridge.FullDimKNorm fit megatron-core's norm slots."
_EPS = "It must be inside the root, 1 / sqrt(mean(x^2) + eps), and be config.json's rms_norm_eps"

# fmt: off
WRONG_LAWS: tuple[WrongLaw, ...] = (
    # The norms of queries and keys.
    _wrong("norm over each head", "norm", "Queries and keys are normed one head at a time, MiniMax-M2 norms all heads at once: every attention score is off. megatron-core's qk_layernorm does this. " + _FULL_NORM, q_norm="each_head", k_norm="each_head"),
    _wrong("query norm over each head", "norm", "Queries are normed one head at a time, keys over all heads: every attention score is off. " + _FULL_NORM, q_norm="each_head"),
    _wrong("key norm over each head", "norm", "Keys are normed one head at a time, queries over all heads: every attention score is off. " + _FULL_NORM, k_norm="each_head"),
    _wrong("no norm of queries and keys", "norm", "Queries and keys are not normed: attention scores have another size, and the norms' weights no gradient. Set both norm slots of the attention's spec. " + _FULL_NORM, q_norm="nothing", k_norm="nothing"),
    _wrong("no query norm", "norm", "Queries are not normed, keys are. Set q_layernorm in the attention's spec. " + _FULL_NORM, q_norm="nothing"),
    _wrong("no key norm", "norm", "Keys are not normed, queries are. Set k_layernorm in the attention's spec. " + _FULL_NORM, k_norm="nothing"),
    _wrong("norm after RoPE", "attention", "Queries and keys are rotated first and normed then: the norm's weights scale other channels. Norm before the rotation.", qk_norm_place="after_rope"),
    _wrong("query and key norm weights exchanged", "norm", "Of the two norms' weights laid end to end the first are taken for the keys' and the rest for the queries'. Give q_norm.weight to queries and k_norm.weight to keys.", qk_norm_weights="key_first"),
    _wrong("query/key norm weight + 1", "norm", "The norms of queries and keys multiply by 1 + weight (zero-centered gamma), the checkpoint's weights are the factors themselves. Set layernorm_zero_centered_gamma to False, or take 1 from the weights as they are loaded, and add it as they are saved.", qk_gamma="weight_plus_one"),
    _wrong("query/key norm eps outside the root", "norm", f"The norms of queries and keys divide by sqrt(mean(x^2)) + eps. {_EPS}.", qk_eps_place="outside_root"),
    _wrong("query/key norm eps 1e-5", "norm", f"The norms of queries and keys have eps 1e-5 (megatron-core's default). {_EPS}: pass config.layernorm_epsilon on.", qk_eps=1e-5),
    _wrong("query/key norm eps 1e-8", "norm", f"The norms of queries and keys have eps 1e-8. {_EPS}: pass config.layernorm_epsilon on.", qk_eps=1e-8),
    # Over tensor-parallel ranks.
    _wrong("root mean square of each rank's heads", "norm", "Every tensor-parallel rank norms over its own heads: outputs change with the tensor-parallel size. Sum the squares over the ranks, and divide by the number of all heads' channels.", ranks=_TP, qk_square_sum="own_rank"),
    _wrong("backward sum missing", "norm", "The sum of squares is summed over tensor-parallel ranks in the forward pass, its gradient is not in the backward pass: outputs are right, gradients of queries and keys are not, and no error says so. An in-place torch.distributed.all_reduce has no backward, and megatron-core's own reduction passes the gradient on unsummed; use an all-reduce whose backward is an all-reduce. " + _FULL_NORM, ranks=_TP, qk_backward_sum="own_rank"),
    _wrong("norm weight gradients summed over different heads", "norm", "After the backward pass the gradients of the query and key norm weights are added up over tensor-parallel ranks, which hold different heads: all shards train with the same, wrong gradient. megatron-core's finalize_model_grads does this to each parameter whose name contains q_layernorm or k_layernorm while qk_layernorm is on; call the sharded weights something else.", ranks=_TP, qk_weight_gradient="summed_over_ranks"),
    _wrong("norm weight gradients times tensor-parallel size", "norm", "The gradients of the query and key norm weights are multiplied by the tensor-parallel size, as where each rank computes the whole norm on gathered heads and the gradients are then summed. Divide, or do not gather.", ranks=_TP, qk_weight_gradient="times_ranks"),
    _wrong("key replicas' gradients not summed", "norm", "Several ranks hold each key head, and each keeps the part of the key norm weight's gradient that comes from its own query heads: the replicas drift apart. Sum it over the ranks that share the head.", ranks=_SHARED, key_replicas="first"),
    _wrong("key replicas' gradients averaged", "norm", "Several ranks hold each key head, and the key norm weight's gradient is averaged over them: each has a part, so the parts must be summed.", ranks=_SHARED, key_replicas="averaged"),
    _wrong("layer norm gradients of one rank's tokens", "model", "Under sequence parallelism each rank sees some of the tokens, and the layer norms' weight gradients are not summed over the ranks. Set sequence_parallel on the norms' weights: finalize_model_grads sums those.", ranks=_TP, hidden_weight_gradient="first_rank"),
    _wrong("router gradient of one rank's tokens", "router", "Under sequence parallelism each rank sees some of the tokens, and the router weight's gradient is not summed over the ranks. Set sequence_parallel on the router's weight: finalize_model_grads sums those.", ranks=_TP, router_weight_gradient="first_rank"),
    # Rotary position embedding.
    _wrong("all channels rotated", "attention", "RoPE rotates all channels of a head, MiniMax-M2 the first rotary_dim only: attention to other positions is off. Set rotary_percent to rotary_dim / head_dim (0.5).", rotary_channels="all"),
    _wrong("no RoPE", "attention", "Queries and keys are not rotated: the model does not know where a token stands. Set position_embedding_type to 'rope'.", rotary_channels="none"),
    _wrong("last channels rotated", "attention", "RoPE rotates the last rotary_dim channels of each head. Rotate the first ones.", rotary_end="last"),
    _wrong("interleaved RoPE", "attention", "RoPE pairs each channel with its neighbour. Pair channel i with channel i + rotary_dim / 2: set rotary_interleaved to False.", rotary_pairing="interleaved"),
    _wrong("RoPE frequencies over head_dim", "attention", "RoPE's frequencies are theta^(-2i / head_dim). They must be theta^(-2i / rotary_dim): only the channels that rotate count.", rotary_exponent="head_dim"),
    _wrong("RoPE theta 10000", "attention", "RoPE's theta is 10,000, megatron-core's default. Set rotary_base to config.json's rope_theta (5,000,000).", rope_theta=1e4),
    _wrong("RoPE theta 1000000", "attention", "RoPE's theta is 1,000,000. Set rotary_base to config.json's rope_theta (5,000,000).", rope_theta=1e6),
    # Attention.
    _wrong("attention scaled by hidden / heads", "attention", "Scores are divided by sqrt(hidden_size / num_attention_heads), but head_dim is a size of its own here. Divide by sqrt(head_dim): set kv_channels to head_dim.", attention_scale="hidden_per_head"),
    _wrong("attention not scaled", "attention", "Scores are not divided by sqrt(head_dim). Leave softmax_scale at its default.", attention_scale="one"),
    _wrong("key heads tiled", "attention", "Query head h reads key head h mod groups. It must read h // (heads / groups): neighbouring query heads share a key head. Repeat each key head, do not tile them.", key_heads="tiled"),
    _wrong("not causal", "attention", "Tokens attend to later ones. Set attn_mask_type to causal, or pass a causal mask.", mask="none"),
    # The router.
    _wrong("bias in the weights", "router", "The experts' weights are the scores with e_score_correction_bias. The bias belongs into the choice only; weights are the scores without it.", router_bias="choice_and_weights"),
    _wrong("bias ignored", "router", "Experts are chosen without e_score_correction_bias: other experts work on the tokens. Set moe_router_enable_expert_bias and load the bias.", router_bias="nowhere"),
    _wrong("weights not normalised", "router", "The chosen experts' weights are their scores. They must be divided by their sum.", router_weights="scores"),
    _wrong("softmax scores", "router", "Scores are a softmax over the experts, with the bias in the choice. Set moe_router_score_function to 'sigmoid'.", router_scores="softmax"),
    _wrong("softmax scores, bias ignored", "router", "Scores are a softmax over the chosen experts, and e_score_correction_bias is not used, as with megatron-core's defaults. Set moe_router_score_function to 'sigmoid' and moe_router_enable_expert_bias.", router_scores="softmax", router_bias="nowhere"),
    _wrong("router in bfloat16", "router", "The router's weight and logits are bfloat16: close choices flip. Both are float32 in the checkpoint; set moe_router_dtype to 'fp32' and keep the weight as it is.", router_dtype="bfloat16"),
    _wrong("one expert too few", "router", "One expert fewer than num_experts_per_tok works on each token. Set moe_router_topk to it.", fewer_experts=1),
    # The rest of the model.
    _wrong("layer norm weight + 1", "model", "The norms of the residual stream multiply by 1 + weight (zero-centered gamma), the checkpoint's weights are the factors themselves. Set layernorm_zero_centered_gamma to False.", hidden_gamma="weight_plus_one"),
    _wrong("all norm weights + 1", "model", "All norms multiply by 1 + weight (zero-centered gamma), the checkpoint's weights are the factors themselves. Set layernorm_zero_centered_gamma to False.", hidden_gamma="weight_plus_one", qk_gamma="weight_plus_one"),
    _wrong("layer norm eps outside the root", "model", f"The norms of the residual stream divide by sqrt(mean(x^2)) + eps. {_EPS}.", hidden_eps_place="outside_root"),
    _wrong("layer norm eps 1e-5", "model", f"The norms of the residual stream have eps 1e-5 (megatron-core's default). {_EPS}: set layernorm_epsilon.", hidden_eps=1e-5),
    _wrong("layer norm eps 1e-8", "model", f"The norms of the residual stream have eps 1e-8. {_EPS}: set layernorm_epsilon.", hidden_eps=1e-8),
    _wrong("all norms' eps outside the root", "model", f"All norms divide by sqrt(mean(x^2)) + eps. {_EPS}.", hidden_eps_place="outside_root", qk_eps_place="outside_root"),
    _wrong("all norms' eps 1e-5", "model", f"All norms have eps 1e-5 (megatron-core's default). {_EPS}: set layernorm_epsilon.", hidden_eps=1e-5, qk_eps=1e-5),
    _wrong("all norms' eps 1e-8", "model", f"All norms have eps 1e-8. {_EPS}: set layernorm_epsilon.", hidden_eps=1e-8, qk_eps=1e-8),
    _wrong("gelu experts", "model", "The experts' activation is gelu, megatron-core's default. Set activation_func to silu.", activation="gelu"),
    # Layouts of weights.
    _wrong("qkv read as blocks", "attention", "linear_qkv is loaded group by group (query heads, key head, value head) and read as [q; k; v]. Split it group by group.", qkv_rows="read_as_blocks"),
    _wrong("qkv stored as blocks", "attention", "linear_qkv is loaded as [q; k; v] and read group by group. Store each group's query heads, its key head and its value head together (reference.fusion.merge_qkv).", qkv_rows="stored_as_blocks"),
    _wrong("keys and values exchanged", "attention", "In each group of linear_qkv the value head is taken for the key head. The order is query heads, key head, value head.", qkv_rows="value_before_key"),
    _wrong("gate and up exchanged", "model", "The activation is applied to w3's half of linear_fc1. It belongs on w1's, which comes first.", gate_up="up_first"),
    _wrong("expert halves exchanged", "model", "An expert's tensor-parallel ranks hold w2's columns in another order than w1's and w3's rows: each rank multiplies channels with the wrong columns. Cut both in the same order.", ranks=_ETP, expert_shards="reversed"),
    _wrong("gate and up cut in one run", "model", "[w1; w3] is cut over expert-tensor-parallel ranks as one run of rows, so that some ranks hold gates only. Each rank needs its rows of w1 over its rows of w3.", ranks=_ETP, expert_shards="one_run"),
    _wrong("FP8 scales in bfloat16", "model", "Block scales are rounded to bfloat16 before they are multiplied with the codes: every FP8 weight is up to 0.4 % off. Multiply in float32 and round the product.", fp8_scales="bfloat16"),
)
# fmt: on
