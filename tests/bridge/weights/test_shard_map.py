"""An export's plan is what `reference.sharding` says."""

import numpy as np
import pytest
import torch

from bridge.weights.gather import GatherRequest, rounds
from bridge.weights.shard_map import ShardMap, spread
from reference.config import ModelConfig
from reference.parallelism import Parallelism
from reference.sharding import parameters, placements
from reference.weights import Dialect

CONFIG = ModelConfig(
    num_hidden_layers=3,
    hidden_size=64,
    vocab_size=131,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    rotary_dim=16,
    intermediate_size=48,
    num_local_experts=4,
    num_experts_per_tok=2,
)
LAYOUTS = [
    Parallelism(),
    Parallelism(tp=4, etp=2, ep=2, dp=2, pp=2, layers_per_stage=(1, 2)),
    Parallelism(tp=2, etp=1, ep=4, cp=2, vocab_divisor=100),
    Parallelism(pp=2, vpp=2, dp=4, ep=2, layers_per_stage=(1, 0, 1, 1)),
    Parallelism(tp=2, etp=4, dp=4, ep=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_first_holders_are_the_references_placements(layout: Parallelism) -> None:
    dialect = Dialect.MEGATRON_LOCAL if layout.dp > 1 else Dialect.MEGATRON_TE
    held = {rank: parameters(CONFIG, layout, rank, dialect) for rank in range(layout.world_size)}
    shard_map = ShardMap(CONFIG, layout, dialect)
    ours = {
        source.name: [
            (replicas.ranks[0], *shard_map.parameter(source), replicas.start, replicas.rows, replicas.cols)
            for replicas in shard_map.replicas(source)
        ]
        for source in shard_map.sources
    }
    assert ours == {
        name: [(place.rank, place.chunk, place.name, place.start, *place.piece[1:]) for place in places]
        for name, places in placements(held).items()
    }
    pieces = {rank: {piece for p in of_rank for piece in p.pieces} for rank, of_rank in held.items()}
    for source in shard_map.sources:
        for replicas in shard_map.replicas(source):
            holds = [rank for rank, of_rank in pieces.items() if (source.name, replicas.rows, replicas.cols) in of_rank]
            assert sorted(replicas.ranks) == holds


def test_rounds_are_bounded_complete_and_in_order_for_each_rank() -> None:
    shard_map = ShardMap(CONFIG, LAYOUTS[1], Dialect.MEGATRON_TE)
    rank_of = spread(shard_map, shard_map.sources)
    wanted = [GatherRequest(source, torch.bfloat16, rank_of[source.name]) for source in shard_map.sources]
    batches = rounds(wanted, limit=20_000)
    for rank in range(LAYOUTS[1].world_size):
        own = [[one for one in batch if one.rank == rank] for batch in batches]
        assert [one for part in own for one in part] == [one for one in wanted if one.rank == rank]
        assert all(len(part) <= 1 or sum(2 * np.prod(one.source.shape) for one in part) <= 20_000 for part in own)
