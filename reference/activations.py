"""What training keeps in memory between forward and backward, beside weights, gradients and optimizer state.

One table has a row for everything that a decoder layer keeps for its backward pass, and one for what the ends of the
model keep; then the largest temporaries. A rank's peak is what its microbatches in flight keep
(`reference.pipeline_schedule`), plus the largest of the temporaries beside it.

It is for megatron-core 0.19 with Transformer Engine, bfloat16 (of float32 twice as much where that is), and the layer
of `bridge.model.layer_spec`: attention that keeps no probabilities (flash or cuDNN), the `alltoall` dispatcher without
fused permutation, grouped experts with the fused SwiGLU that takes the router's weights, a load-balancing loss, no
accumulation of gradients inside the matrix products. Routing is assumed to be balanced: every expert gets equally many
tokens. Not counted: the tables of the rotation, padding, the communication's and CUDA's own buffers, fragmentation, and
what attention keeps more of float32, for which Transformer Engine has no flash attention.

Sources: megatron-core moe.token_dispatcher.MoEAlltoAllTokenDispatcher, moe.moe_utils (permute, sort_chunks_by_idxs,
topk_routing_with_score_function), moe.experts.TEGroupedMLP, fusions.fused_bias_swiglu.WeightedSwiGLUFunction,
tensor_parallel.cross_entropy, pipeline_parallel.schedules, and recompute; Transformer Engine 2.20 layernorm_linear,
grouped_linear, linear, ops.basic.rmsnorm and dot_product_attention.backends; `compiled.norm.function`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, get_args

from reference.config import ModelConfig
from reference.memory import Dtype
from reference.model_class import DEFAULT_MODEL, ModelClass
from reference.parallelism import Parallelism, padded_vocab_size
from reference.pipeline_schedule import in_flight

Recompute = Literal["none", "selective", "full"]
MODEL_DTYPE = 2  # bytes of an element that has the model's dtype, where that is bfloat16


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a step computes on: as the settings of `minimax-m2 train` of these names.

    Args:
        seq_length: tokens of a sequence.
        micro_batch_size: sequences in one forward pass of a rank.
        global_batch_size: sequences of a step, over all ranks; None for as many as fill the pipeline.
        recompute: what the backward pass computes again: "none", "selective" (the core of attention) or "full" (every
            layer, from its input).
        model: megatron-core's class; a HybridModel's attention and experts are layers of their own.
        dtype: of the model.

    Raises:
        ValueError: a number is not positive, or `recompute` is none of these.
    """

    seq_length: int
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    recompute: Recompute = "none"
    model: ModelClass = DEFAULT_MODEL
    dtype: Dtype = "bf16"

    def __post_init__(self) -> None:
        for name in ("seq_length", "micro_batch_size", "global_batch_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be a positive integer, found {size}")
        if self.recompute not in get_args(Recompute):
            raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}, found {self.recompute!r}")

    @property
    def element_bytes(self) -> int:
        """Of a number in the model's dtype."""
        return 4 if self.dtype == "fp32" else MODEL_DTYPE

    def microbatches(self, parallelism: Parallelism) -> int:
        """Forward passes of each data-parallel rank in a step.

        Raises:
            ValueError: the batch does not divide, or not as virtual stages need it.
        """
        once = self.micro_batch_size * parallelism.dp
        batch = once * parallelism.pp if self.global_batch_size is None else self.global_batch_size
        if batch % once:
            raise ValueError(
                f"global_batch_size ({batch}) must be a multiple of micro_batch_size x dp = "
                f"{self.micro_batch_size} x {parallelism.dp} = {once}"
            )
        number = batch // once
        if parallelism.vpp > 1 and number % parallelism.pp:
            raise ValueError(
                f"with virtual stages the {number} microbatches of a step (global_batch_size / (micro_batch_size x "
                f"dp)) must be a multiple of pp ({parallelism.pp})"
            )
        return number

    def check(self, config: ModelConfig, parallelism: Parallelism) -> None:
        """Check that this layout can train on it.

        Raises:
            ValueError: batch or sequence do not divide by the parallel sizes, or the model has no such positions.
        """
        self.microbatches(parallelism)
        tp, cp = parallelism.tp, parallelism.cp
        pieces = (2 * cp if cp > 1 else 1) * tp
        if self.seq_length % pieces:
            raise ValueError(
                f"seq_length ({self.seq_length}) must be a multiple of {pieces}: tp ({tp}) ranks divide it, and with "
                f"cp ({cp}) above 1 each twice"
            )
        if self.seq_length > config.max_position_embeddings:
            raise ValueError(
                f"seq_length ({self.seq_length}) is above the model's max_position_embeddings "
                f"({config.max_position_embeddings})"
            )


class Tokens(Enum):
    """Which tokens of a microbatch of s x b a rank has in a tensor."""

    SHARE = "its sequence-parallel share, s b / (tp cp)"
    SEQUENCE = "of every tensor-parallel rank, s b / cp: each has its own heads or its own part of the vocabulary"
    ROWS = "those sent to its experts, one row for each: its share x experts a token x etp"


class Widths(NamedTuple):
    """Elements a token has in the tensors of one rank."""

    hidden: int
    queries: int
    keys: int
    qkv: int
    heads: int
    intermediate: int
    experts: int
    chosen: int
    vocabulary: int


class Kept(NamedTuple):
    """One tensor that is kept for the backward pass of one microbatch.

    `size` is an element's bytes, those of bfloat16 for the model's dtype; `attention` says in which half of the layer
    it is.
    """

    what: str
    tokens: Tokens
    elements: Callable[[Widths], int]
    size: int
    attention: bool = False


LAYER_INPUT, EXPERTS_INPUT, CORE = "layer input", "attention's result added to it", "log-sum-exp of the scores"
_SHARE, _SEQUENCE, _ROWS = Tokens

# Of one decoder layer. The first two names are what full recomputation keeps; CORE is what selective does not.
LAYER: tuple[Kept, ...] = (
    Kept(LAYER_INPUT, _SHARE, lambda w: w.hidden, 2, True),
    Kept("1 / rms of it", _SHARE, lambda w: 1, 4, True),
    Kept("normed, into linear_qkv", _SHARE, lambda w: w.hidden, 2, True),
    Kept("queries, keys and values before their norm", _SEQUENCE, lambda w: w.qkv, 2, True),
    Kept("1 / rms of queries and of keys", _SEQUENCE, lambda w: 2, 4, True),
    Kept("queries", _SEQUENCE, lambda w: w.queries, 2, True),
    Kept("keys", _SEQUENCE, lambda w: w.keys, 2, True),
    Kept("values", _SEQUENCE, lambda w: w.keys, 2, True),
    Kept(CORE, _SEQUENCE, lambda w: w.heads, 4, True),
    Kept("attention's output, into linear_proj", _SEQUENCE, lambda w: w.queries, 2, True),
    Kept(EXPERTS_INPUT, _SHARE, lambda w: w.hidden, 2),
    Kept("1 / rms of it", _SHARE, lambda w: 1, 4),
    Kept("normed, into the router", _SHARE, lambda w: w.hidden, 2),
    Kept("the router's scores", _SHARE, lambda w: w.experts, 4),
    Kept("the load-balancing loss's scores", _SHARE, lambda w: w.experts, 4),
    Kept("the chosen experts' scores", _SHARE, lambda w: w.chosen, 4),
    Kept("sums of scores, of the router and of the loss", _SHARE, lambda w: 2, 4),
    Kept("the chosen experts", _SHARE, lambda w: w.chosen, 8),
    Kept("tokens sorted by expert: a place for each pair", _SHARE, lambda w: w.experts, 8),
    Kept("the token of each row", _SHARE, lambda w: w.chosen, 8),
    Kept("rows, into linear_fc1", _ROWS, lambda w: w.hidden, 2),
    Kept("gate and up", _ROWS, lambda w: 2 * w.intermediate, 2),
    Kept("the router's weight of each row", _ROWS, lambda w: 1, 4),
    Kept("weighted activation, into linear_fc2", _ROWS, lambda w: w.intermediate, 2),
)
# Of the stage with the embedding, of all stages but the last, and of the last.
EMBEDDING: tuple[Kept, ...] = (Kept("token ids", _SEQUENCE, lambda w: 1, 8),)
SENT: tuple[Kept, ...] = (Kept("what was sent to the next stage", _SHARE, lambda w: w.hidden, 2),)
HEAD: tuple[Kept, ...] = (
    Kept("last layer's output", _SHARE, lambda w: w.hidden, 2),
    Kept("1 / rms of it", _SHARE, lambda w: 1, 4),
    Kept("normed, into the head", _SHARE, lambda w: w.hidden, 2),
    Kept("softmax", _SEQUENCE, lambda w: w.vocabulary, 4),
    Kept("labels", _SEQUENCE, lambda w: 1, 8),
    Kept("whether a label is of this rank", _SEQUENCE, lambda w: 1, 1),
)


class Activations(NamedTuple):
    """A rank's peak in bytes: what its microbatches in flight keep, and the largest temporaries beside that."""

    kept: int
    temporary: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self)


def widths(config: ModelConfig, parallelism: Parallelism) -> Widths:
    """Elements a token has in one rank's tensors."""
    groups = max(1, config.num_key_value_heads // parallelism.tp)  # ranks may share a key head, and have it all
    heads, a_group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    return Widths(
        hidden=config.hidden_size,
        queries=heads // parallelism.tp * config.head_dim,
        keys=groups * config.head_dim,
        qkv=groups * (a_group + 2) * config.head_dim,
        heads=heads // parallelism.tp,
        intermediate=config.intermediate_size // parallelism.expert_tp,
        experts=config.num_local_experts,
        chosen=config.num_experts_per_tok,
        vocabulary=padded_vocab_size(config, parallelism) // parallelism.tp,
    )


def token_counts(config: ModelConfig, parallelism: Parallelism, workload: Workload) -> dict[Tokens, int]:
    """Tokens of one microbatch on one rank, with balanced routing."""
    sequence = workload.seq_length * workload.micro_batch_size // parallelism.cp
    share = sequence // parallelism.tp
    rows = share * config.num_experts_per_tok * parallelism.expert_tp
    return {Tokens.SHARE: share, Tokens.SEQUENCE: sequence, Tokens.ROWS: rows}


def layer_rows(workload: Workload) -> list[Kept]:
    """The rows that a layer keeps of each microbatch in flight."""
    if workload.recompute == "full":
        inputs = {ModelClass.GPT: (LAYER_INPUT,), ModelClass.HYBRID: (LAYER_INPUT, EXPERTS_INPUT)}[workload.model]
        return [row for row in LAYER if row.what in inputs]
    return [row for row in LAYER if row.what != CORE or workload.recompute == "none"]


def row_bytes(rows: Iterable[Kept], widths: Widths, tokens: dict[Tokens, int], element: int = MODEL_DTYPE) -> int:
    """Bytes that these rows take for one microbatch, with so many for an element of the model's dtype."""
    sizes = {MODEL_DTYPE: element}
    return sum(tokens[row.tokens] * row.elements(widths) * sizes.get(row.size, row.size) for row in rows)


def activations(config: ModelConfig, parallelism: Parallelism, workload: Workload) -> list[Activations]:
    """The peak of a rank of each pipeline stage.

    Raises:
        ValueError: the layout does not divide the model or the workload (`Parallelism.check`, `Workload.check`).
    """
    parallelism.check(config)
    workload.check(config, parallelism)
    width, tokens = widths(config, parallelism), token_counts(config, parallelism, workload)
    stages, count = parallelism.stages(config), parallelism.pp * parallelism.vpp
    element = workload.element_bytes
    a_layer, sent, head = (row_bytes(rows, width, tokens, element) for rows in (layer_rows(workload), SENT, HEAD))
    moments = _moments(config, parallelism, workload, width, tokens)
    found = []
    for stage in range(parallelism.pp):
        chunks = range(stage, count, parallelism.pp)
        each = [len(stages[chunk]) * a_layer + (chunk < count - 1) * sent for chunk in chunks]
        each[0] += (stage == 0) * row_bytes(EMBEDDING, width, tokens)
        times = in_flight(
            pp=parallelism.pp, vpp=parallelism.vpp, stage=stage, microbatches=workload.microbatches(parallelism)
        )
        kept = max(sum(held * size for held, size in zip(counts, each, strict=True)) for counts in times)
        computes = any(stages[chunk] for chunk in chunks)
        peaks = [Activations(kept, max(moments.values()) if computes else 0)]
        if stage == parallelism.pp - 1:  # the backward pass of a loss follows its forward pass at once
            logits = element * tokens[Tokens.SEQUENCE] * width.vocabulary
            peaks.append(Activations(kept + head, logits))
        found.append(max(peaks, key=lambda peak: peak.total))
    return found


def _moments(
    config: ModelConfig, parallelism: Parallelism, workload: Workload, width: Widths, tokens: dict[Tokens, int]
) -> dict[str, int]:
    """Bytes of temporaries beside what is kept, where a layer has most of them; the layer computed again is one.

    Transformer Engine makes the gradients of all local experts' weights before megatron-core adds the first one to its
    buffer. What the backward pass has come past is freed.
    """
    share, rows = tokens[Tokens.SHARE], tokens[Tokens.ROWS]
    sent = share * config.num_experts_per_tok
    weights = config.num_local_experts // parallelism.ep * width.intermediate * width.hidden
    combine = sent * (1 + (parallelism.ep > 1)) + rows * (2 + 2 * (parallelism.expert_tp > 1))  # float32 if summed
    elements = {
        "forward: rows before they are sent, where they arrive, results sorted by expert and as they go back": (
            combine * width.hidden
        ),
        "backward of linear_fc2: gradients of its output, weights and input": (
            rows * (width.hidden + width.intermediate) + weights
        ),
        "backward of linear_fc1: gradients of weights and input; those behind take what was kept for them": (
            rows * (width.hidden - width.intermediate) + 2 * weights
        ),
    }
    again = 0
    if workload.recompute == "full":
        alone = [row for row in LAYER if not row.attention] if workload.model is ModelClass.HYBRID else LAYER
        inputs = {row.what for row in layer_rows(workload)}
        again = row_bytes([row for row in alone if row.what not in inputs], width, tokens, workload.element_bytes)
    each = workload.element_bytes
    return {what: each * (number + share * width.hidden) + again for what, number in elements.items()}
