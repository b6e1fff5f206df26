"""How many parameters each rank holds, the bytes that training keeps for them, and which layouts fit if one does not.

Counted from TABLE and the parallel sizes without naming a tensor: all ranks of a pipeline stage hold equally many, so a
plan for hundreds of ranks is a handful of sums. They are the sums over `reference.sharding.parameters`; a test says so.

Bytes are those of megatron-core's Adam with bfloat16 parameters and float32 gradients: 2 + 4 + 12 a parameter (a
float32 copy and two moments). The router's weight is float32 and needs no copy: 4 + 4 + 8. Its bias is not trained: 4.
The distributed optimizer divides the 12 (or 8) among the ranks that hold the same parameters: dp x cp of them outside
the experts, the expert-data-parallel ones inside. Not counted: activations, the few elements that fill a gradient
buffer up to its alignment, and what communication and CUDA take.

Source: megatron-core DistributedOptimizer._build_model_and_main_param_groups, Float16OptimizerWithFloat16Params.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from reference.checkpoint import source_shapes
from reference.config import ModelConfig
from reference.names import TABLE, Layout, Row, Scope
from reference.parallelism import Parallelism, padded_vocab_size, spread_layers

NODE = 8  # GPUs that tensor parallelism is worth spreading over
MOST_GROWTH = 16  # advice looks at up to this many times the given ranks


class Holding(NamedTuple):
    """Numbers of parameters on a rank: bfloat16 ones outside the experts and in them; the routers' float32 ones."""

    dense: int = 0
    expert: int = 0
    router: int = 0
    bias: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Bytes(NamedTuple):
    """What training keeps on a rank, in bytes."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer state."""
        return sum(self)


def holdings(config: ModelConfig, parallelism: Parallelism) -> list[Holding]:
    """What a rank of each pipeline stage holds, its virtual chunks together; the padded vocabulary is counted.

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


def training_bytes(holding: Holding, parallelism: Parallelism, *, distributed_optimizer: bool) -> Bytes:
    """Bytes of a rank that holds so many parameters; a share of the optimizer's state is rounded up."""
    stage = parallelism.tp * parallelism.cp * parallelism.dp
    dense_ranks = parallelism.dp * parallelism.cp if distributed_optimizer else 1
    expert_ranks = stage // (parallelism.expert_tp * parallelism.ep) if distributed_optimizer else 1
    trained = holding.dense + holding.expert
    return Bytes(
        weights=2 * trained + 4 * (holding.router + holding.bias),
        gradients=4 * (trained + holding.router),
        optimizer=12 * -(-holding.dense // dense_ranks)
        + 12 * -(-holding.expert // expert_ranks)
        + 8 * -(-holding.router // dense_ranks),
    )


def _sum(counted: Iterable[tuple[int, Holding]]) -> Holding:
    """The sum of count x holding, number by number."""
    scaled = [[count * number for number in holding] for count, holding in counted]
    return Holding(*map(sum, zip(*scaled, strict=True)))


def _held(row: Row, config: ModelConfig, parallelism: Parallelism) -> Holding:
    """A rank's share of one instance of a row: the same number on every rank that has one."""
    shapes = source_shapes(row, config)
    elements = sum(map(math.prod, shapes))
    if row.layout is Layout.VOCABULARY:
        elements = padded_vocab_size(config, parallelism) * config.hidden_size
    divisor = {
        Layout.REPLICATED: 1,
        Layout.KEY_HEADS: min(parallelism.tp, config.num_key_value_heads),
        Layout.GATE_UP: parallelism.expert_tp,
        Layout.EXPERT_COLUMNS: parallelism.expert_tp,
    }.get(row.layout, parallelism.tp)
    return Holding(**{_KINDS[row]: elements // divisor})


def _kind(row: Row) -> str:
    """The field of `Holding` that a row counts in."""
    (name, *_), *_ = row.names.values()
    if row.scope is Scope.EXPERT:
        return "expert"
    return (
        "bias" if name.endswith("e_score_correction_bias") else "router" if name.endswith(".gate.weight") else "dense"
    )


_KINDS = {row: _kind(row) for row in TABLE}


# --- Other layouts of the same model. ---


class Fit(NamedTuple):
    """A layout, the bytes of its largest rank, and what is different in it, such as "ep 8 -> 16"."""

    parallelism: Parallelism
    distributed_optimizer: bool
    largest: int
    changes: tuple[str, ...]


class Advice(NamedTuple):
    """Layouts of `gpus` ranks that fit, nearest first and the roomiest last; and the least the given ranks can do."""

    gpus: int
    fits: tuple[Fit, ...]
    least: Fit


def default_layers(config: ModelConfig, stages: int) -> tuple[int, ...] | None:
    """`Parallelism.layers_per_stage` where nobody chose one: None if the layers divide evenly, else spread."""
    return spread_layers(config.num_hidden_layers, stages) if config.num_hidden_layers % stages else None


def layouts(config: ModelConfig, like: Parallelism, ranks: int) -> Iterator[Parallelism]:
    """Every choice of tp, pp, ep and etp on so many ranks that the model divides by; the rest is as in `like`.

    Tensor-parallel sizes stay within a node, unless `like` is larger; each stage has a layer; where pp is 1, so is vpp.
    """
    narrow = [size for size in range(1, max(NODE, like.tp, like.expert_tp) + 1) if ranks % size == 0]
    stages = [size for size in range(1, min(ranks, config.num_hidden_layers) + 1) if ranks % size == 0]
    experts = [size for size in range(1, config.num_local_experts + 1) if config.num_local_experts % size == 0]
    for tp, pp in product(narrow, stages):
        dp, rest = divmod(ranks, tp * pp * like.cp)
        vpp = like.vpp if pp > 1 else 1
        if rest or pp * vpp > config.num_hidden_layers:
            continue
        layers = like.layers_per_stage if pp == like.pp else default_layers(config, pp * vpp)
        for ep, etp in product(experts, narrow):
            if tp * like.cp * dp % (etp * ep) == 0:
                layout = replace(like, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp=dp, layers_per_stage=layers)
                if _divides(config, layout):
                    yield layout


def advise(config: ModelConfig, given: Parallelism, *, memory: int, distributed_optimizer: bool) -> Advice:
    """Layouts whose largest rank needs at most `memory` bytes, with the distributed optimizer or as given.

    Nearest is: fewest things changed, then the smallest factors. Of the layouts in which the same things change, the
    nearest stands for all; the four nearest are named. Where none fits, twice as many ranks are tried, and again.
    """

    def fits(ranks: int) -> list[Fit]:
        return [
            Fit(layout, on, _largest(config, layout, on), _changes(given, layout, on != distributed_optimizer))
            for layout in layouts(config, given, ranks)
            for on in sorted({distributed_optimizer, True})
        ]

    def nearness(fit: Fit) -> tuple[int, float, int]:
        before, after = _sizes(given), _sizes(fit.parallelism)
        factors = sum(abs(math.log2(after[name] / before[name])) for name in before)
        return len(fit.changes), factors, fit.largest

    ranks, found = given.world_size, fits(given.world_size)
    least = min(found, key=lambda fit: (fit.largest, *nearness(fit)))
    while not any(fit.largest <= memory for fit in found) and ranks < MOST_GROWTH * given.world_size:
        ranks *= 2
        found = fits(ranks)
    found = [fit for fit in found if fit.largest <= memory]
    nearest: dict[tuple[str, ...], Fit] = {}
    for fit in sorted(found, key=nearness):
        nearest.setdefault(tuple(change.split()[0] for change in fit.changes), fit)
    roomiest = sorted(found, key=lambda fit: (fit.largest, *nearness(fit)))[:1]
    return Advice(ranks, tuple(dict.fromkeys([*list(nearest.values())[:4], *roomiest])), least)


def _largest(config: ModelConfig, parallelism: Parallelism, distributed_optimizer: bool) -> int:
    return max(
        training_bytes(held, parallelism, distributed_optimizer=distributed_optimizer).total
        for held in holdings(config, parallelism)
    )


def _divides(config: ModelConfig, layout: Parallelism) -> bool:
    try:
        layout.check(config)
    except ValueError:
        return False
    return True


def _sizes(parallelism: Parallelism) -> dict[str, int]:
    """The sizes that one chooses; dp follows."""
    return {name: getattr(parallelism, name) for name in ("tp", "pp", "vpp", "ep")} | {"etp": parallelism.expert_tp}


def _changes(given: Parallelism, other: Parallelism, optimizer_changes: bool) -> tuple[str, ...]:
    before, after = _sizes(given), _sizes(other)
    changed = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    return tuple(["distributed optimizer"] * optimizer_changes + changed)
