"""How many parameters each rank holds, and the bytes that training keeps for them.

All ranks of a pipeline stage hold equally many parameters, so a few sums over `reference.weights.TABLE` are enough for
hundreds of ranks. They equal the sums over `reference.sharding.parameters` of each rank.

Bytes are those of megatron-core's Adam with bfloat16 parameters and float32 gradients: 2 + 4 + 12 a parameter (a
float32 copy and two moments). The router's weight is float32 and needs no copy: 4 + 4 + 8; so has every weight of a
float32 model. The router's bias is not trained: 4. The distributed optimizer divides the 12 (or 8) among the ranks that
hold the same parameters: dp x cp of them outside the experts, the expert-data-parallel ones inside. Not counted: the
few elements that fill a gradient buffer up to its alignment, and what communication and CUDA take. Activations depend
on more: `reference.activations`.

Source: megatron-core DistributedOptimizer._build_model_and_main_param_groups, Float16OptimizerWithFloat16Params.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from reference.config import ModelConfig
from reference.parallelism import Parallelism, padded_vocab_size
from reference.weights import TABLE, Layout, Row, Scope, Storage

Dtype = Literal["bf16", "fp32"]


class Holding(NamedTuple):
    """Numbers of parameters on a rank: outside the experts, in the experts, and the routers' weights and biases.

    The first two have the model's dtype, the routers' float32.
    """

    dense: int = 0
    expert: int = 0
    router: int = 0
    bias: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Bytes(NamedTuple):
    """What training keeps on a rank, in bytes; activations are 0 where no workload says what they are of."""

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0

    @property
    def total(self) -> int:
        """Weights, gradients, optimizer state, and the activations where they are counted."""
        return sum(self)


def holdings(config: ModelConfig, parallelism: Parallelism) -> list[Holding]:
    """What a rank of each pipeline stage holds, all its virtual chunks together, padding of the vocabulary included.

    Raises:
        ValueError: the model does not divide by the parallel sizes (`Parallelism.check`).
    """
    parallelism.check(config)
    stages, last = parallelism.stages(config), parallelism.pp - 1
    local_experts = config.num_local_experts // parallelism.ep
    layer, ends = [], []
    for row in TABLE:
        held = _held(row, config, parallelism)
        if row.scope is Scope.MODEL:
            ends.append((0 if not layer else last, held))  # what stands before the layers is on the first stage
        else:
            layer.append((local_experts if row.scope is Scope.EXPERT else 1, held))
    one_layer = _sum(layer)
    return [
        _sum(
            [(sum(map(len, stages[stage :: parallelism.pp])), one_layer)]
            + [(1, held) for where, held in ends if where == stage]
        )
        for stage in range(parallelism.pp)
    ]


def training_bytes(
    holding: Holding, parallelism: Parallelism, *, distributed_optimizer: bool, dtype: Dtype = "bf16"
) -> Bytes:
    """What training keeps for these parameters; the distributed optimizer's share of a rank is rounded up."""
    weight, state = {"bf16": (2, 12), "fp32": (4, 8)}[dtype]
    stage = parallelism.tp * parallelism.cp * parallelism.dp
    dense_ranks = parallelism.dp * parallelism.cp if distributed_optimizer else 1
    expert_ranks = stage // (parallelism.expert_tp * parallelism.ep) if distributed_optimizer else 1
    trained = holding.dense + holding.expert
    return Bytes(
        weights=weight * trained + 4 * (holding.router + holding.bias),
        gradients=4 * (trained + holding.router),
        optimizer=state * -(-holding.dense // dense_ranks)
        + state * -(-holding.expert // expert_ranks)
        + 8 * -(-holding.router // dense_ranks),
    )


def _sum(counted: Iterable[tuple[int, Holding]]) -> Holding:
    """The sum of count x holding, number by number."""
    scaled = [[count * number for number in holding] for count, holding in counted]
    return Holding(*map(sum, zip(*scaled, strict=True)))


def _held(row: Row, config: ModelConfig, parallelism: Parallelism) -> Holding:
    """A rank's share of one instance of a row: the same number on every rank that has one."""
    elements = sum(map(math.prod, row.shapes(config)))
    if row.layout is Layout.VOCABULARY:
        elements = padded_vocab_size(config, parallelism) * config.hidden_size
    divisor = {
        Layout.REPLICATED: 1,
        Layout.KEY_HEADS: min(parallelism.tp, config.num_key_value_heads),
        Layout.GATE_UP: parallelism.expert_tp,
        Layout.EXPERT_COLUMNS: parallelism.expert_tp,
    }.get(row.layout, parallelism.tp)
    return Holding(**{_kind(row): elements // divisor})


def _kind(row: Row) -> str:
    """The field of `Holding` that a row counts in."""
    if row.scope is Scope.EXPERT:
        return "expert"
    if row.storage is not Storage.FLOAT32:
        return "dense"
    return "router" if row.trained else "bias"
