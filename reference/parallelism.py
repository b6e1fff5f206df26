"""The parallel sizes of a run, and the place of each rank and each layer in them.

Ranks are numbered in megatron-core's default order: the tensor-parallel index changes fastest, then context, data and
pipeline. Expert layers divide the same ranks in another way: expert-tensor parallel fastest, then expert, expert-data
and pipeline. Source: megatron-core parallel_state: RankGenerator, order "tp-cp-ep-dp-pp".
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from reference.config import ModelConfig


class Coordinates(NamedTuple):
    """A rank's index along every parallel axis."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Parallel sizes; the world is tp x cp x dp x pp ranks.

    Args:
        tp: tensor parallel.
        pp: pipeline parallel.
        vpp: virtual pipeline chunks on each pipeline rank.
        ep: expert parallel.
        etp: expert-tensor parallel; None means `tp`, as in megatron-core.
        cp: context parallel.
        dp: data parallel.
        layers_per_stage: decoder layers of each of the pp x vpp stages, in model order; None means equally many.
        vocab_divisor: the vocabulary is filled up to a multiple of this times `tp` (Megatron-LM's
            `make_vocab_size_divisible_by`).

    Raises:
        ValueError: a size is not positive, or the experts' grid does not divide the ranks of a pipeline stage.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    dp: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    vocab_divisor: int = 1

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("tp", "pp", "vpp", "ep", "cp", "dp", "vocab_divisor")}
        for name, size in (sizes | {"etp": self.expert_tp}).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, found {size!r}")
        stage = self.tp * self.cp * self.dp
        if stage % (self.expert_tp * self.ep):
            raise ValueError(
                f"the tp x cp x dp = {stage} ranks of a pipeline stage must divide by etp x ep = "
                f"{self.expert_tp} x {self.ep}; raise dp or lower ep"
            )

    @property
    def expert_tp(self) -> int:
        """Expert-tensor-parallel size, `etp` or else `tp`."""
        return self.tp if self.etp is None else self.etp

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def coordinates(self, rank: int) -> Coordinates:
        """A rank's index along every parallel axis.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} does not exist in a world of {self.world_size}")
        stage, inside = divmod(rank, self.tp * self.cp * self.dp)
        return Coordinates(
            tp=inside % self.tp,
            cp=inside // self.tp % self.cp,
            dp=inside // (self.tp * self.cp),
            pp=stage,
            etp=inside % self.expert_tp,
            ep=inside // self.expert_tp % self.ep,
            edp=inside // (self.expert_tp * self.ep),
        )

    def stages(self, config: ModelConfig) -> list[range]:
        """The decoder layers of each stage in model order; stage v x pp + p is chunk v of pipeline rank p.

        Raises:
            ValueError: the layers do not divide evenly and no layout is given, or the layout does not fit.
        """
        count, layers = self.pp * self.vpp, config.num_hidden_layers
        if self.layers_per_stage is None and layers % count:
            raise ValueError(
                f"{layers} layers do not divide over pp x vpp = {count} stages; give layers_per_stage, for example "
                f"{spread_layers(layers, count)}"
            )
        per_stage = (layers // count,) * count if self.layers_per_stage is None else self.layers_per_stage
        if len(per_stage) != count or sum(per_stage) != layers or min(per_stage) < 0:
            raise ValueError(
                f"layers_per_stage {per_stage} must be {count} counts (pp x vpp) that add up to {layers} layers, found "
                f"{len(per_stage)} that add up to {sum(per_stage)}"
            )
        return [range(start, stop) for start, stop in pairwise(accumulate(per_stage, initial=0))]

    def check(self, config: ModelConfig) -> None:
        """Check that the model can be divided by these sizes.

        Raises:
            ValueError: it does not; names the two numbers.
        """
        self.stages(config)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        divisions = (
            ("num_attention_heads", heads, "tp", self.tp),
            ("num_local_experts", config.num_local_experts, "ep", self.ep),
            ("intermediate_size", config.intermediate_size, "etp", self.expert_tp),
        )
        for what, total, axis, size in divisions:
            if total % size:
                raise ValueError(f"{what} ({total}) must be divisible by {axis} ({size})")
        if groups % self.tp and self.tp % groups:
            raise ValueError(
                f"tp ({self.tp}) must divide num_key_value_heads ({groups}) or be a multiple of it, so that every rank "
                "has whole key/value heads or shares one with as many others"
            )
        rows = (heads + 2 * groups) * config.head_dim
        if rows % self.tp:
            raise ValueError(f"linear_qkv's {rows} rows must be divisible by tp ({self.tp})")


def spread_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as equal as possible; the middle gets more, as the ends also hold embedding and head."""
    size, extra = divmod(layers, stages)
    first = (stages - extra) // 2
    return tuple(size + (first <= stage < first + extra) for stage in range(stages))


def hybrid_layer_pattern(config: ModelConfig, parallelism: Parallelism) -> str:
    """The layers of a `HybridModel` as megatron-core writes them: `*E`, attention and experts, for each layer.

    `|` cuts the stages apart, virtual ones too, always between whole layers: "*E|*E*E" has one layer and then two.
    Source: megatron-core hybrid_layer_allocation.

    Raises:
        ValueError: the layers do not fit the stages (`Parallelism.stages`).
    """
    return "|".join("*E" * len(layers) for layers in parallelism.stages(config))


def padded_vocab_size(config: ModelConfig, parallelism: Parallelism) -> int:
    """Rows of embedding and head over all ranks: the vocabulary, filled up to a multiple of vocab_divisor x tp."""
    multiple = parallelism.vocab_divisor * parallelism.tp
    return -(-config.vocab_size // multiple) * multiple
