"""Which ranks hold which piece of every on-disk tensor, worked out from one layer and one expert.

`reference.sharding.placements` says the same, but from a list of what every rank holds, which is too long for 62
layers, 256 experts and 512 ranks. All layers are cut alike, and so are all experts. So the pieces, and the
tensor-parallel ranks that hold them, are taken from the `parameters` of a model of one layer whose expert 0 is on ranks
of its own; pipeline stage, expert-parallel rank and data-parallel replica only shift them to other ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, cached_property
from typing import NamedTuple

from reference.config import ModelConfig
from reference.names import find
from reference.parallelism import Parallelism
from reference.sharding import parameters
from reference.weights import Dialect, Row, Scope, instances


class Source(NamedTuple):
    """An on-disk tensor of the model, and which pipeline stage and expert-parallel rank hold it.

    It is number `part` of the tensors of `row`. `stage` counts virtual stages too: chunk * pp + pipeline rank. `layer`
    and `expert` are the local ones, as in the name of its parameter on the ranks that hold it.
    """

    name: str
    shape: tuple[int, ...]
    row: Row
    part: int
    stage: int
    expert_rank: int
    layer: int
    expert: int


class Replicas(NamedTuple):
    """A piece of an on-disk tensor and the ranks that hold it.

    `source[rows, cols]` is in the tensor's parameter, from row `start` on, on each of `ranks`.
    """

    rows: tuple[int, int]
    cols: tuple[int, int] | None
    start: int
    ranks: tuple[int, ...]


class ShardMap:
    """Where every on-disk tensor of a model lies in a parallel layout.

    Raises:
        ValueError: the model does not divide by the parallel sizes.
    """

    def __init__(self, config: ModelConfig, parallelism: Parallelism, dialect: Dialect):
        parallelism.check(config)
        self.config, self.parallelism, self.dialect = config, parallelism, dialect
        self._cached_replicas = cache(self._replicas)

    @cached_property
    def sources(self) -> list[Source]:
        """Every on-disk tensor, in model order."""
        return list(self._sources())

    def _sources(self) -> Iterator[Source]:
        config, local_experts = self.config, self.config.num_local_experts // self.parallelism.ep
        stages = self.parallelism.stages(config)
        of_layer = {layer: (stage, layer - layers.start) for stage, layers in enumerate(stages) for layer in layers}
        shapes = cache(lambda row: row.shapes(config))
        end = 0
        for row, layer, expert in instances(config):
            stage, local_layer = (end, 0) if row.scope is Scope.MODEL else of_layer[layer]
            end = end if row.scope is Scope.MODEL else len(stages) - 1  # what follows the layers
            expert_rank, local_expert = divmod(expert, local_experts)
            names = row.format(Dialect.HF_DISK, layer, expert)
            for part, (name, shape) in enumerate(zip(names, shapes(row), strict=True)):
                yield Source(name, shape, row, part, stage, expert_rank, local_layer, local_expert)

    def replicas(self, source: Source) -> tuple[Replicas, ...]:
        """The pieces of a tensor, in the order of their positions in it."""
        return self._cached_replicas(source.row, source.part, source.stage % self.parallelism.pp, source.expert_rank)

    def parameter(self, source: Source) -> tuple[int, str]:
        """The chunk and the name of the parameter that a tensor is part of, on the ranks that hold it."""
        (name,) = source.row.format(self.dialect, source.layer, source.expert)
        return source.stage // self.parallelism.pp, name

    def _replicas(self, row: Row, part: int, pp: int, expert_rank: int) -> tuple[Replicas, ...]:
        sizes = self.parallelism
        ranks_of_stage, stride, first = sizes.tp * sizes.cp * sizes.dp, sizes.tp, 0
        if row.scope is Scope.EXPERT:
            stride, first = sizes.expert_tp * sizes.ep, expert_rank * sizes.expert_tp
        groups = [pp * ranks_of_stage + replica + first for replica in range(0, ranks_of_stage, stride)]
        return tuple(
            Replicas(rows, cols, start, tuple(group + rank for group in groups for rank in ranks))
            for (rows, cols, start), ranks in self._pattern[row, part].items()
        )

    @cached_property
    def _pattern(self) -> dict[tuple[Row, int], dict[tuple, list[int]]]:
        """For (row, part) the pieces (rows, cols, start), and the tensor- or expert-tensor-parallel ranks of each."""
        sizes, experts = self.parallelism, self.config.num_local_experts
        grid = Parallelism(
            tp=sizes.tp,
            ep=experts,  # one expert a rank
            etp=sizes.expert_tp,
            dp=experts * sizes.expert_tp,
            vocab_divisor=sizes.vocab_divisor,
        )
        one_layer = replace(self.config, num_hidden_layers=1)
        found: dict[tuple[Row, int], dict[tuple, list[int]]] = {}
        for rank in range(max(sizes.tp, sizes.expert_tp)):
            for parameter in parameters(one_layer, grid, rank, self.dialect):
                start = 0
                for piece in parameter.pieces:
                    if piece.source is not None:
                        key = find(piece.source, Dialect.HF_DISK)
                        assert key is not None
                        ranks = sizes.tp if key.row.scope is not Scope.EXPERT else sizes.expert_tp
                        if rank < ranks:
                            pieces = found.setdefault((key.row, key.part), {})
                            pieces.setdefault((piece.rows, piece.cols, start), []).append(rank)
                    start += piece.rows[1] - piece.rows[0]
        return {kind: dict(sorted(pieces.items(), key=lambda item: item[0][:2])) for kind, pieces in found.items()}


def spread(shard_map: ShardMap, sources: list[Source]) -> dict[str, int]:
    """Give each tensor to one of the ranks that hold a piece of it, and each rank about as many elements."""
    load = [0] * shard_map.parallelism.world_size
    found = {}
    candidates = cache(lambda replicas: tuple(dict.fromkeys(rank for replicas in replicas for rank in replicas.ranks)))
    for source in sources:
        rank = min(candidates(shard_map.replicas(source)), key=load.__getitem__)
        load[rank] += math.prod(source.shape)
        found[source.name] = rank
    return found
