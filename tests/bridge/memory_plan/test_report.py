"""A plan's words, table, advice and JSON say the same as its numbers."""

import json

import pytest
from support.plans import FULL, full_plan, large, too_large, working

from bridge.memory_plan import report
from bridge.memory_plan.plan import advice
from bridge.memory_plan.report import NOT_COUNTED, advice_rows, compact, flags, pattern, runs, summary, table, to_json
from reference.activations import Workload, activations

pytestmark = pytest.mark.usefixtures("types_unchecked")


def test_numbers_in_words():
    assert runs([0, 1, 2, 8, 9, 12]) == [range(3), range(8, 10), range(12, 13)]
    assert compact(runs([0, 1, 2, 8, 9, 12])) == "0-2, 8-9, 12"
    assert compact(runs(range(0, 64, 8))) == "0, 8, …, 56"
    assert compact([range(3, 3)]) == "none"


def test_table_of_512_ranks():
    headings, rows = table(large())
    assert headings[-2:] == ["total, with distributed optimizer", "without distributed optimizer"]
    assert len(rows) == 8
    assert {len(row) for row in rows} == {len(headings)}
    assert rows[0][:3] == ["0-63", "embedding, layers 0-6", "0-31, 32-63, …, 224-255 (32 a rank)"]
    assert rows[1] == [
        "64-127", "layers 7-14", "0-31, 32-63, …, 224-255 (32 a rank)", "0.050 + 3.624 B",
        "7.36 GB", "14.70 GB", "5.51 GB", "27.57 GB", "66.12 GB",
    ]  # fmt: skip
    assert rows[-1][:2] == ["448-511", "layers 55-61, norm and head"]
    headings, rows = table(large()._replace(distributed_optimizer=False))
    assert headings[-2:] == ["total, without distributed optimizer", "with distributed optimizer"]
    assert rows[1][-2:] == ["66.12 GB", "27.57 GB"]


def test_table_of_8_ranks_names_each():
    _, rows = table(too_large())
    assert [row[:3] for row in rows[3:5]] == [
        ["3", "embedding, layers 0-30", "128-255"],
        ["4", "layers 31-61, norm and head", "0-127"],
    ]


def test_virtual_chunks():
    planned = full_plan(2, pp=2, vpp=2)
    assert planned.parallelism.layers_per_stage == (15, 16, 16, 15)
    assert [row[1] for row in table(planned)[1]] == [
        "embedding, layers 0-14, 31-46",
        "layers 15-30, 47-61, norm and head",
    ]


def test_the_pattern_has_the_stages_of_the_plan():
    planned = full_plan(2, pp=2, vpp=2)
    assert [len(stage) for stage in pattern(planned).split("|")] == [30, 32, 32, 30]
    assert to_json(planned)["hybrid_layer_pattern"] == pattern(planned)
    assert pattern(too_large()) == "|".join(["*E" * 31] * 2)


def test_a_plan_that_fits_needs_no_advice():
    planned = large()
    assert advice(planned) is None
    lines = summary(planned)
    assert lines[0] == "228.7 B parameters on 512 GPUs: tp 8, cp 1, dp 8, pp 8, vpp 1, ep 8, etp 1"
    assert lines[1:] == ["fullest rank: 27.57 GB of 80.00 GB; fits, 52.43 GB left", NOT_COUNTED]


def test_advice_can_be_followed():
    """The options that are printed, read as the command would, give the plan that was promised."""
    planned = full_plan(64, distributed_optimizer=False, tp=2, pp=2, ep=2, etp=1)
    found = advice(planned)
    assert found.gpus == 64
    assert summary(planned, found) == summary(planned)  # nothing to add: some layout of these GPUs fits
    assert "DOES NOT FIT" in summary(planned)[1]
    headings, rows = advice_rows(found)
    assert headings[0] == "layouts of 64 GPUs that fit"
    assert 2 <= len(rows) <= 5
    for (options, changes, largest), fit in zip(rows, found.fits, strict=True):
        assert changes
        words = options.split()
        on = "--no-distributed-optimizer" not in words
        sizes = {name[2:]: int(size) for name, size in zip(words[::2], words[1::2], strict=False)}
        again = full_plan(64, distributed_optimizer=on, **sizes)
        assert again.parallelism == fit.parallelism
        assert again.headroom >= 0
        assert report.gigabytes(again.largest) == largest


def test_options_name_layers_that_are_not_the_default():
    planned = full_plan(64, "50GB", tp=2, pp=4, ep=2, layers_per_stage=(14, 17, 17, 14))
    found = advice(planned)
    for fit in found.fits:
        assert ("--layers-per-stage 14,17,17,14" in flags(fit)) == (fit.parallelism.pp == 4)
    assert any(fit.parallelism.pp == 4 for fit in found.fits)


def test_where_no_layout_of_these_gpus_fits():
    planned = too_large()
    found = advice(planned)
    assert found.gpus == 64  # 16 B of weights, gradients and state a parameter and more: 8 x 80 GB can not be enough
    assert 228.7 * 16 > 32 * 80
    assert summary(planned, found)[-1] == (
        "no layout of these 8 GPUs fits: the least is 514.83 GB with --tp 4 --pp 2 --ep 2 --etp 2; 64 would do"
    )
    hopeless = planned._replace(memory=10**9)
    assert summary(hopeless, advice(hopeless))[-1].endswith("nor do 128")


def test_json_has_every_rank():
    planned = too_large()
    said = json.loads(json.dumps(to_json(planned)))
    assert (said["gpus"], said["largest"], said["headroom"]) == (8, planned.largest, planned.headroom)
    assert said["sizes"]["dp"] == 2
    assert [rank["rank"] for rank in said["ranks"]] == list(range(8))
    assert said["ranks"][5] == {
        "rank": 5,
        "pipeline_rank": 1,
        "layers": [[31, 62]],
        "experts": [128, 256],
        "parameters": planned.ranks[5].holding._asdict(),
        "without_distributed_optimizer": planned.ranks[5].replicated._asdict(),
        "with_distributed_optimizer": planned.ranks[5].distributed._asdict(),
    }
    assert said["advice"]["gpus"] == 64
    assert said["advice"]["fits"][0]["largest"] <= said["memory"]
    assert to_json(large())["advice"] is None


def test_activations_are_counted_where_there_is_a_workload():
    planned, without = working(), large()
    peaks = [peak.total for peak in activations(FULL, planned.parallelism, planned.workload)]
    assert [planned.ranks[rank].distributed.activations for rank in range(0, 512, 64)] == peaks
    for one, other in zip(planned.ranks, without.ranks, strict=True):
        assert one.replicated.total - other.replicated.total == one.distributed.activations
        assert one.distributed[:3] == other.distributed[:3]
    headings, rows = table(planned)
    assert headings[-3:] == ["activations", "total, with distributed optimizer", "without distributed optimizer"]
    assert {len(row) for row in rows} == {len(headings)} == {len(table(without)[0]) + 1}
    assert [row[-3] for row in rows] == [report.gigabytes(peak) for peak in peaks]
    assert summary(planned)[1] == "activations: 64 microbatches of 1 x 4096 tokens a step, recompute none"
    assert "balanced" in summary(planned)[3]
    assert NOT_COUNTED not in summary(planned)
    said = json.loads(json.dumps(to_json(planned)))
    assert said["workload"]["microbatches"] == 64
    assert said["ranks"][64]["with_distributed_optimizer"]["activations"] == peaks[1]
    assert to_json(without)["workload"] is None


def test_activations_make_a_plan_fail_and_advice_counts_them():
    """Parameters of 128 ranks fit; with the activations of four microbatches of 16384 tokens they do not."""
    sizes = {"tp": 2, "pp": 4, "ep": 16, "etp": 1}
    assert full_plan(128, **sizes).headroom > 0
    workload = Workload(seq_length=8192, micro_batch_size=2, global_batch_size=512)
    planned = full_plan(128, workload=workload, **sizes)
    assert planned.headroom < 0
    found = advice(planned)
    assert any("recompute" in fit.changes for fit in found.fits)
    for fit in found.fits:
        words = flags(fit).split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert (given["--seq-length"], given["--micro-batch-size"]) == ("8192", "2")
        recompute = given.get("--recompute", "none")
        assert (recompute != "none") == ("recompute" in fit.changes)
        named = {name: int(given.get(f"--{name}", 1)) for name in ("tp", "pp", "vpp", "ep", "etp", "cp")}
        again = full_plan(found.gpus, workload=Workload(**{**vars(workload), "recompute": recompute}), **named)
        assert again.largest == fit.largest <= planned.memory
