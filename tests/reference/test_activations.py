"""Activations: a recorded run's peak, hand arithmetic, and megatron-core's own schedule of microbatches."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from reference.activations import (
    CORE,
    LAYER,
    Tokens,
    Workload,
    activations,
    row_bytes,
    token_counts,
    widths,
)
from reference.config import ModelConfig
from reference.memory import holdings, training_bytes
from reference.model_class import ModelClass
from reference.parallelism import Parallelism, spread_layers
from reference.pipeline_schedule import in_flight

FULL = ModelConfig(rotary_dim=64)
RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "train_h200.json"


def test_a_recorded_run_peaks_where_it_is_planned() -> None:
    """Four layers of true width on one H200: the total within 10 %, and the activations alone within 25 %.

    The peak of the steps after the first, when the optimizer has its state. What it holds beside parameters,
    gradients and state is activations, temporaries and the libraries' workspaces, which are not planned.
    """
    record = json.loads(RECORD.read_text())
    assert "4 layers, hidden 3072, 32 experts, vocabulary 32768, bfloat16" in record["config"]["true width"]
    assert "sequences of 4096 random tokens" in record["config"]["true width"]
    measured = 1e9 * max(line["memory_gb"] for line in record["rows"]["true width, eager"])
    config = replace(FULL, num_hidden_layers=4, num_local_experts=32, vocab_size=32768)
    (held,) = holdings(config, Parallelism())
    static = training_bytes(held, Parallelism(), distributed_optimizer=True).total
    (peak,) = activations(config, Parallelism(), Workload(seq_length=4096, global_batch_size=4))
    print(f"total: {(static + peak.total) / 1e9:.2f} GB planned, {measured / 1e9:.2f} measured")
    print(f"activations: {peak.total / 1e9:.2f} GB planned, {(measured - static) / 1e9:.2f} measured")
    assert static + peak.total == pytest.approx(measured, rel=0.1)
    assert peak.total == pytest.approx(measured - static, rel=0.25)


def test_a_layer_of_the_released_model_by_hand() -> None:
    """Bytes a token: of the whole layer on one rank, and at tp 8, ep 8, where a rank has an eighth of the tokens."""
    workload, sizes = Workload(seq_length=4096), (Parallelism(), Parallelism(tp=8, ep=8, etp=1, dp=8))
    alone, spread = (row_bytes(LAYER, widths(FULL, p), token_counts(FULL, p, workload)) for p in sizes)
    hidden, heads = 2 * 3072, 2 * 8192 + 2 * 6144 + 2 * 2 * 1024 + 2 * 6144 + 4 * 48
    router = 4 * 256 * 2 + 8 * 256 + 8 * 4 + 2 * 4 + 8 * 8 + 8 * 8
    rows = 8 * (2 * 3072 + 2 * 3072 + 2 * 1536 + 4)
    assert alone == 4096 * (4 * hidden + 2 * 4 + heads + 2 * 4 + router + rows)
    assert spread == 4096 * (4 * hidden + 2 * 4 + heads + router + rows) // 8 + 4096 * 2 * 4


def test_expert_tensor_parallel_ranks_have_each_others_rows() -> None:
    workload = Workload(seq_length=4096)
    rows = [row for row in LAYER if row.tokens is Tokens.ROWS]
    alone, cut = (
        {row.what: row_bytes([row], widths(FULL, p), token_counts(FULL, p, workload)) for row in rows}
        for p in (Parallelism(tp=4, etp=1), Parallelism(tp=4, etp=4))
    )
    growth = {what: cut[what] / alone[what] for what in alone}
    assert growth == {
        "rows, into linear_fc1": 4,
        "the router's weight of each row": 4,
        "gate and up": 1,
        "weighted activation, into linear_fc2": 1,
    }


def test_stages_keep_what_is_in_flight() -> None:
    """At pp 4: the first stage keeps four microbatches of its layers, the last one microbatch and the head's."""
    layout = Parallelism(pp=4, ep=8, dp=8, layers_per_stage=(15, 16, 16, 15))
    workload = Workload(seq_length=2048, global_batch_size=8 * 16)
    found = activations(FULL, layout, workload)
    width, tokens = widths(FULL, layout), token_counts(FULL, layout, workload)
    a_layer, sent = row_bytes(LAYER, width, tokens), 2048 * 3072 * 2
    assert [peak.kept for peak in found[:3]] == [
        4 * (15 * a_layer + sent + 2048 * 8),
        3 * (16 * a_layer + sent),
        2 * (16 * a_layer + sent),
    ]
    head = 2048 * (2 * 3072 * 2 + 4 + 200064 * 4 + 9)
    assert (found[3].kept, found[3].temporary) == (15 * a_layer + head, 2048 * 200064 * 2)
    few = activations(FULL, layout, replace(workload, global_batch_size=8 * 2))
    assert [peak.kept for peak in few] == [
        2 * (15 * a_layer + sent + 2048 * 8), *(2 * (16 * a_layer + sent) for _ in range(2)), found[3].kept
    ]  # fmt: skip


def test_what_is_recomputed_is_not_kept() -> None:
    layout = Parallelism(pp=2, ep=4, dp=4, layers_per_stage=(31, 31))
    kept = {
        recompute: activations(FULL, layout, Workload(seq_length=1024, recompute=recompute))[0]
        for recompute in ("none", "selective", "full")
    }
    an_input, core = 1024 * 3072 * 2, 1024 * 48 * 4
    ends = 2 * (1024 * 8 + an_input)
    assert kept["full"].kept == 2 * 31 * an_input + ends
    assert kept["none"].kept - kept["selective"].kept == 2 * 31 * core
    a_layer = row_bytes(LAYER, widths(FULL, layout), token_counts(FULL, layout, Workload(seq_length=1024)))
    assert kept["full"].temporary - kept["none"].temporary == a_layer - an_input
    hybrid = activations(FULL, layout, Workload(seq_length=1024, recompute="full", model=ModelClass.HYBRID))[0]
    assert hybrid.kept == 2 * 2 * 31 * an_input + ends
    assert [row.what for row in LAYER if row.what == CORE] == [CORE]


def test_float32_has_twice_the_bytes_of_what_is_bfloat16() -> None:
    layout, work = Parallelism(pp=2, ep=4, dp=4, layers_per_stage=(31, 31)), Workload(seq_length=1024)
    wide, narrow = (activations(FULL, layout, replace(work, dtype=dtype))[0] for dtype in ("fp32", "bf16"))
    width, tokens = widths(FULL, layout), token_counts(FULL, layout, work)
    doubled = row_bytes([row for row in LAYER if row.size == 2], width, tokens)
    assert wide.kept - narrow.kept == 2 * (31 * doubled + 1024 * 3072 * 2)
    assert wide.temporary == 2 * narrow.temporary
    last = [activations(FULL, layout, replace(work, dtype=dtype))[1].total for dtype in ("fp32", "bf16")]
    assert last[1] < last[0] < 2 * last[1]


# --------------------------------------------------------------------------------------- microbatches in flight


@pytest.fixture
def stage_of() -> Iterator[object]:
    """Says to megatron-core's schedules which pipeline rank they are on."""

    def be(pp: int, vpp: int, stage: int) -> None:
        parallel_state.set_pipeline_model_parallel_world_size(pp)
        parallel_state.set_pipeline_model_parallel_rank(stage)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp if vpp > 1 else None)

    yield be
    parallel_state.set_pipeline_model_parallel_world_size(None)
    parallel_state.set_pipeline_model_parallel_rank(None)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)


def by_megatron(pp: int, vpp: int, microbatches: int) -> set[tuple[int, ...]]:
    """The moments of a step on this rank, from megatron-core's warm-up and its table of chunks, all of it."""
    total, _, warm_up, _ = get_pp_rank_microbatches(microbatches, vpp, pp)
    order = [chunk for _, chunk in get_schedule_table(microbatches, vpp, pp)]
    assert len(order) == total
    forward = [order[:done] for done in range(1, total + 1)]
    backward = [[vpp - 1 - chunk for chunk in order[: max(0, len(run) - 1 - warm_up)]] for run in forward]
    return {
        tuple(ran.count(chunk) - came.count(chunk) for chunk in range(vpp))
        for ran, came in zip(forward, backward, strict=True)
    }


def test_microbatches_in_flight_are_megatron_cores(stage_of) -> None:
    for pp, vpp, groups in product((1, 2, 3, 4, 8), (1, 2, 3), (1, 2, 3, 7)):
        for stage in range(pp) if pp > 1 or vpp == 1 else ():
            stage_of(pp, vpp, stage)
            microbatches = groups * pp
            found = in_flight(pp=pp, vpp=vpp, stage=stage, microbatches=microbatches)
            assert found == by_megatron(pp, vpp, microbatches), (pp, vpp, stage, microbatches)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 11])
def test_fewer_microbatches_than_stages(stage_of, microbatches: int) -> None:
    for stage in range(4):
        stage_of(4, 1, stage)
        found = in_flight(pp=4, vpp=1, stage=stage, microbatches=microbatches)
        assert found == by_megatron(4, 1, microbatches)
        assert max(found) == (min(4 - stage, microbatches),)


def test_virtual_stages_keep_more() -> None:
    """The first of four ranks keeps 2 x 3 + 4 + 1 passes through one of two chunks, instead of 4 through both."""
    times = in_flight(pp=4, vpp=2, stage=0, microbatches=64)
    assert max(sum(counts) for counts in times) == 2 * 3 + 4 + 1
    sizes = {"pp": 4, "ep": 8, "dp": 8}
    workload = Workload(seq_length=2048, global_batch_size=8 * 16)
    layers = {vpp: spread_layers(64, 4 * vpp) for vpp in (1, 2)}
    config = replace(FULL, num_hidden_layers=64)
    plain, virtual = (
        activations(config, Parallelism(**sizes, vpp=vpp, layers_per_stage=layers[vpp]), workload)[0].kept
        for vpp in (1, 2)
    )
    assert virtual / plain == pytest.approx(11 / 8, rel=0.01)


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seq_length": 0}, r"seq_length must be a positive integer, found 0"),
        ({"micro_batch_size": 0}, r"micro_batch_size must be a positive integer, found 0"),
        ({"global_batch_size": -8}, r"global_batch_size must be a positive integer, found -8"),
        ({"recompute": "some"}, r"recompute must be one of none, selective, full, found 'some'"),
        ({"global_batch_size": 12}, r"global_batch_size \(12\) must be a multiple of .* = 1 x 8 = 8"),
        ({"global_batch_size": 8}, r"with virtual stages the 1 microbatches .* must be a multiple of pp \(2\)"),
        ({"seq_length": 1023}, r"seq_length \(1023\) must be a multiple of 2: tp \(2\)"),
        ({"seq_length": 400000}, r"seq_length \(400000\) is above the model's max_position_embeddings"),
    ],
)
def test_a_workload_that_cannot_be(settings, said) -> None:
    layout = Parallelism(tp=2, pp=2, vpp=2, dp=8, layers_per_stage=(15, 16, 16, 15))
    with pytest.raises(ValueError, match=said):
        activations(FULL, layout, Workload(**{"seq_length": 1024, **settings}))
