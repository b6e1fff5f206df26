"""`bench train` without a GPU: its schedule and figures, the rows' tables, and real visits of a tiny model by gloo."""

import importlib.util
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

sys.path.insert(0, str(Path(__file__).parent))
import bench_train
import idle
from train_rows import BASE, LAYERS, PEER, ROWS, TINY, TRUE_WIDTH, TRUTH, lacks
from train_visit import visit

from bridge.model.config import transformer_config
from bridge.model.fusions import CROSS_ENTROPY, fusion_settings
from bridge.model.process_groups import groups_of
from bridge.model.safe_settings import REFUSALS, check_settings
from bridge.training.cuda_graphs import CudaGraphs
from bridge.training.metrics import flops_per_token
from reference.parallelism import Parallelism

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the rows are those of true width")


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_are_of_fields_and_layers_that_there_are() -> None:
    known = {field.name for field in fields(TransformerConfig)}
    for row in ROWS.values():
        assert set(row.settings) <= known
        assert row.layers in LAYERS
        assert set(row.lifts) <= REFUSALS.keys()
        fusion_settings(row.fusions)
    assert len({(str(row.settings), *row[1:]) for row in ROWS.values()}) == len(ROWS)


def test_what_is_refused_is_refused_and_nothing_else_is() -> None:
    """By the table of refusals, on a config as a GPU would have it."""
    refused = set()
    for name, row in ROWS.items():
        settings = {**row.settings, **fusion_settings(row.fusions), **(CudaGraphs.settings if row.graphs else {})}
        settings |= {"transformer_impl": "transformer_engine"}
        changed = transformer_config(TINY.config(1))
        for field, value in settings.items():
            setattr(changed, field, value)
        try:
            check_settings(changed)
        except ValueError:
            refused.add(name)
    assert refused == {"FP8 and graphs"}
    lifting = [name for name, row in ROWS.items() if row.lifts]
    assert lifting == [list(ROWS)[-1]], "what may break the GPU's state comes last"


def test_rows_say_what_they_need() -> None:
    assert [name for name in ROWS if lacks(ROWS[name], "local", gpu=False) is None] == [BASE, TRUTH, "HybridModel"]
    its_own = "cross_entropy_te, " if CROSS_ENTROPY == "cross_entropy_te" else ""  # where that is the fastest
    assert lacks(ROWS["fusions"], "local", gpu=False) == (
        f"Transformer Engine, for router, permute, {its_own}gradient_accumulation, grouped_gemm"
    )
    assert lacks(ROWS["graphs"], "local", gpu=False) == "a GPU"
    ours = [name for name, row in ROWS.items() if row.layers == "ours"]
    assert [lacks(ROWS[name], "transformer_engine", gpu=True) for name in ours] == [None] * len(ours)
    if importlib.util.find_spec("megatron.bridge") is None:
        assert lacks(ROWS[PEER], "transformer_engine", gpu=True) == "megatron-bridge and a GPU"


def test_true_width_is_the_released_models() -> None:
    """All but what is said: 4 of 62 layers, 32 experts a rank, a vocabulary of 32768."""
    config = TRUE_WIDTH.config(ep=8)
    assert config == type(config)(rotary_dim=64, num_hidden_layers=4, num_local_experts=256, vocab_size=32768)
    # By hand: attention 2 * 3072 * 128 * (48 + 8), half of 4096 scores twice for 48 heads, 8 experts of three products,
    # the router, and the head; a multiplication and an addition each, forward and twice backward.
    layer = 3072 * 128 * 112 + 2 * 48 * 128 * 2048 + 8 * 3 * 3072 * 1536 + 3072 * 256
    assert flops_per_token(config, 4096) == 6 * (4 * layer + 3072 * 32768)


# ------------------------------------------------------------------------------------------------- schedule and figures


def test_rounds_go_forth_and_back_after_one_that_checks() -> None:
    assert bench_train.schedule([BASE, TRUTH, "graphs"], 2) == [
        (0, BASE), (0, TRUTH), (0, "graphs"), (1, BASE), (1, "graphs"), (2, "graphs"), (2, BASE)
    ]  # fmt: skip
    profiled = bench_train.schedule([BASE, TRUTH, "graphs"], 1, checked=False, profiled=True)
    assert profiled == [(1, BASE), (1, "graphs"), (2, BASE), (2, "graphs")]


def test_a_row_that_failed_is_not_visited_again() -> None:
    visits = [(1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "b"), (2, "c")]
    lines = [
        {"round": 1, "row": "a", "began": 0},
        {"round": 1, "row": "a", "seconds": [1.0], "ended": 1},
        {"round": 1, "row": "b", "began": 1},
    ]
    assert [line["row"] for line in bench_train.unfinished(lines)] == ["b"]
    assert bench_train.left(visits, lines) == [(1, "c"), (2, "a"), (2, "b"), (2, "c")]
    lines.append({"round": 1, "row": "b", "failed": "hung"})
    assert bench_train.unfinished(lines) == []
    assert bench_train.left(visits, lines) == [(1, "c"), (2, "a"), (2, "c")]


def test_a_line_that_was_cut_off_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "visits.jsonl").write_text('{"row": "a"}\n{"row": "b", "seco')
    assert bench_train._read(tmp_path / "visits.jsonl") == [{"row": "a"}]


ABOUT = {"environment": {}, "flops a token": 5e9, "peak FLOP/s": 1e15, "dp": 2}


def timed(number: int, row: str, *seconds: float) -> dict:
    return {"round": number, "row": row, "seconds": list(seconds), "peak GB": 40.0 + number}


def test_figures_are_medians_and_ratios_of_the_same_round() -> None:
    """A machine that is twice as slow in the second round changes no ratio."""
    lines = [ABOUT, timed(1, BASE, 0.4, 0.4), timed(1, PEER, 0.5), timed(1, "graphs", 0.2)]
    lines += [timed(2, BASE, 0.8, 0.8), timed(2, PEER, 1.0), timed(2, "graphs", 0.4)]
    table = bench_train.summary([BASE, PEER, "graphs"], lines, tokens=32768, ranks=2)
    assert (table["graphs"]["x defaults"], table["graphs"]["x megatron-bridge"]) == (2.0, 2.5)
    assert (table[PEER]["x defaults"], table[BASE]["x megatron-bridge"]) == (0.8, 1.25)
    assert "x defaults" not in table[BASE]
    base = table[BASE]
    assert base["tokens/s"] == pytest.approx(32768 / 0.6, abs=0.1)
    assert base["TFLOP/s a GPU"] == pytest.approx(5e9 * 32768 / 0.6 / 2 / 1e12, abs=1e-3)
    assert base["MFU"] == pytest.approx(5e9 * 32768 / 0.6 / 2 / 1e15, abs=1e-4)
    assert base["peak GB"] == 42.0
    assert base["quartiles"] == sorted(base["quartiles"])


def test_a_row_that_computes_something_else_is_seen() -> None:
    def checked(row: str, losses: list[float], norms: list[float]) -> dict:
        return {"round": 0, "row": row, "losses": losses, "norms": norms}

    lines = [ABOUT, checked(BASE, [8.0, 4.0], [2.0, 1.0]), checked(TRUTH, [8.0, 4.004], [2.0, 1.0])]
    lines += [checked("graphs", [8.0, 3.0], [2.0, 1.5])]
    table = bench_train.summary([BASE, TRUTH, "graphs"], lines, tokens=1, ranks=1)
    assert (table["graphs"]["loss off defaults"], table["graphs"]["gradient norm off defaults"]) == (0.25, 0.5)
    assert table[BASE]["loss off float32"] == pytest.approx(1e-3, rel=1e-2)
    assert "loss off defaults" not in table[BASE]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12))
def test_covered_is_the_number_of_covered_units(pieces: list[tuple[int, int]]) -> None:
    intervals = [(start, start + length) for start, length in pieces]
    assert idle.covered(intervals) == len({unit for start, end in intervals for unit in range(start, end)})


# ------------------------------------------------------------------------------------------------------------ real runs


SIZES = {"tp": 1, "pp": 1, "ep": 1, "etp": 1, "cp": 1}


@ON_CPU
def test_rows_start_from_the_same_weights_and_are_timed() -> None:
    with groups_of(Parallelism()):
        base, hybrid, truth = (visit(name, TINY, SIZES, "check") for name in (BASE, "HybridModel", TRUTH))
        timed = visit(BASE, TINY, SIZES, "time")
    assert base == hybrid
    assert base["losses"][1] < base["losses"][0]
    assert base["losses"] != truth["losses"]
    assert base["losses"] == pytest.approx(truth["losses"], rel=0.05)  # bfloat16's rounding, and not another model
    assert base["norms"] == pytest.approx(truth["norms"], rel=0.05)
    assert len(timed["seconds"]) == TINY.timed
    assert timed["peak GB"] > 0


@ON_CPU
def test_nothing_is_profiled_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its visits are not even made: there is nothing to profile."""
    told: list[list[tuple[int, str]]] = []

    def measure(visits: list[tuple[int, str]], *_: object) -> None:
        told.append(visits)
        raise SystemExit

    monkeypatch.setattr(bench_train, "measure", measure)
    with pytest.raises(SystemExit):
        bench_train.main(bench_train.arguments([str(tmp_path / "out"), "--rounds", "1", "--unchecked", "--profile"]))
    assert told == [[(1, BASE), (1, "HybridModel")]]


@ON_CPU
@pytest.mark.slow
def test_when_a_row_fails_the_others_go_on(tmp_path: Path) -> None:
    """Graphs fail without a GPU: the ranks end, others take over, and the failure is written down."""
    plan = {"shape": TINY._asdict(), "sizes": SIZES, "purposes": ["check", "time", "time"]}
    visits = [(0, BASE), (1, "graphs"), (1, BASE), (2, "graphs")]
    reported: list[int] = []
    lines = bench_train.measure(visits, plan, 1, time.time() + 300, lambda lines: reported.append(len(lines)))
    assert reported == sorted(reported)
    assert len(reported) == 3, "one process checks, one fails, one goes on"
    table = bench_train.summary([BASE, "graphs"], lines, tokens=TINY.seq * TINY.microbatches, ranks=1)
    assert "AssertionError" in table["graphs"]["failed"]
    assert table["graphs"].keys() == {"failed", "where"}
    assert len(table[BASE]["ms"]) == TINY.timed
    assert [line["row"] for line in lines if "began" in line] == [BASE, "graphs", BASE]
    about = next(line for line in lines if "environment" in line)
    assert about["flops a token"] == flops_per_token(TINY.config(1), TINY.seq)


@ON_CPU
def test_ranks_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time is over, or when nothing has come of a visit for long."""
    plan = {"out": str(tmp_path / "visits.jsonl")}
    assert bench_train.run_ranks(plan, 1, tmp_path / "log", limit=0.2) is None
    monkeypatch.setattr(bench_train, "VISIT_SECONDS", 0.3)
    began = time.time()
    assert bench_train.run_ranks(plan, 1, tmp_path / "log", limit=60) is None
    assert time.time() - began < 10


def test_gaps_are_told_by_the_kernels_around_them() -> None:
    """Streams overlap: a kernel that ends within another one leaves no gap."""
    works = [
        idle.Work(0, 1000, "a"), idle.Work(500, 700, "b"), idle.Work(3000, 4000, "b"), idle.Work(9000, 9500, "a"),
        idle.Work(11500, 11600, "b"),
    ]  # fmt: skip
    assert idle.longest_gaps(works) == {"b -> a": 5.0, "a -> b": 4.0}
    assert idle.longest_kernels(works) == {"a": 1.5, "b": 1.3}


def test_what_counts_comes_after_the_last_mark() -> None:
    mark = f"at::{idle.MARK}(long)"
    works = [idle.Work(0, 5, "a"), idle.Work(5, 6, mark), idle.Work(7, 8, "b"), idle.Work(8, 9, mark)]
    assert idle.since_mark([*works, idle.Work(9, 12, "c"), idle.Work(11, 13, "d")]) == [(9, 12, "c"), (11, 13, "d")]
