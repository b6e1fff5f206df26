"""An export's plan is what `reference.sharding` says; column slices are the same bytes by either way of reading."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bridge.huggingface import strided_reads
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


@pytest.mark.parametrize("queue", [True, False], ids=["queue", "preadv"])
def test_runs_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: bool) -> None:
    if not queue:
        monkeypatch.setattr(strided_reads, "_take", lambda: None)
    elif (taken := strided_reads._take()) is None:
        pytest.skip("this kernel gives no queue (io_setup)")
    else:
        strided_reads._idle.put(taken)
    data = np.random.default_rng(0).integers(0, 256, (2500, 300), dtype=np.uint8)
    (tmp_path / "data").write_bytes(data.tobytes())
    with (tmp_path / "data").open("rb") as file:
        spans = [
            strided_reads.Span(300, 4000, 300, 4000),  # one run
            strided_reads.Span(110, 70, 300, 2500 * 70),  # more runs than the queue takes at once
            strided_reads.Span(0, 0, 300, 0),
            strided_reads.Span(295, 5, 300, 10),
        ]
        buffers = [np.zeros(span.nbytes, np.uint8) for span in spans]
        reads = list(zip(buffers, spans, strict=True))
        assert strided_reads.read_spans(file.fileno(), reads)
        if queue:
            assert strided_reads._read_queued(file.fileno(), [read for read in reads if read[1].nbytes]), (
                "without preadv"
            )
        assert np.array_equal(buffers[0], data.reshape(-1)[300:4300])
        assert np.array_equal(buffers[1].reshape(2500, 70), data[:, 110:180])
        assert np.array_equal(buffers[3].reshape(2, 5), data[:2, 295:])
        beyond = strided_reads.Span(110 + 300, 70, 300, 2500 * 70)
        assert not strided_reads.read_spans(file.fileno(), [(buffers[1], beyond)]), "one run is past the end"
        beyond = strided_reads.Span(749_000, 4000, 300, 4000)
        assert not strided_reads.read_spans(file.fileno(), [(buffers[0], beyond)] * 4), "the end of each is"
