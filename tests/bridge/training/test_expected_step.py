"""Steps on paper: the table of the README is made again, its layouts fit, and traffic and time are those by hand."""

import json

import pytest
from support.checks import RESULTS, ROOT
from support.plans import FULL

from bridge.memory_plan.plan import advice, parse_memory
from bridge.training.expected_step import BATCH, CHOICES, MEMORY, RATES, ROOM, SEQUENCE, expected_step, planned, table
from bridge.training.metrics import flops_per_token
from reference.activations import Workload
from reference.memory import holdings
from reference.parallelism import Parallelism
from reference.step_traffic import traffic

pytestmark = pytest.mark.usefixtures("types_unchecked")

README = ROOT / "bridge" / "memory_plan" / "README.md"


def test_rates_are_recorded() -> None:
    records = {
        "H100": ("train_speed_h100.json", "NVIDIA H100 80GB HBM3"),
        "H200": ("train_speed_h200_ep2.json", "NVIDIA H200"),
    }
    for kind, rate in RATES.items():
        name, hardware = records[kind]
        record = json.loads((RESULTS / name).read_text())
        assert set(record["hardware"]) == {hardware}
        assert rate == 1e12 * round(record["rows"]["fusions and graphs"]["TFLOP/s a GPU"])


def test_the_readme_has_the_table() -> None:
    made = "\n".join(table(FULL))
    print(made)
    assert f"\n\n{made}\n\n" in README.read_text()


def test_what_is_recommended_fits_and_nothing_else_is_said_to() -> None:
    assert [(choice.gpus, choice.kind) for choice in CHOICES] == [
        (gpus, kind) for gpus in (16, 64, 512) for kind in MEMORY
    ]
    for choice in CHOICES:
        found = planned(FULL, choice)
        memory = parse_memory(MEMORY[choice.kind])
        if choice.sizes:
            assert found.largest <= ROOM * memory
        else:
            assert choice.recompute == "full"
            least = advice(found).least
            assert least.parallelism.world_size == choice.gpus
            assert least.largest > memory


def test_traffic_by_hand() -> None:
    """Two virtual stages on each of four pipeline ranks, and experts over the 8 ranks of tp 2 x dp 4."""
    layout = Parallelism(tp=2, pp=4, vpp=2, ep=8, etp=1, dp=8, layers_per_stage=(7, 8, 8, 8, 8, 8, 8, 7))
    sent = {
        recompute: traffic(FULL, layout, Workload(seq_length=2048, global_batch_size=128, recompute=recompute))
        for recompute in ("none", "full")
    }
    microbatches, layers, share = 16, 16, 1024
    held = max(holdings(FULL, layout), key=lambda held: held.total)
    assert sent["none"].data == (6 * held.dense + 8 * held.router) * 7 // 8 + 6 * held.expert // 2
    assert sent["none"].experts == microbatches * layers * 2 * (share * 8 * (4 * 3072 + 4) * 7 // 8)
    assert sent["none"].tensor == microbatches * layers * 5 * (2048 * 3072 * 2 // 2)
    assert sent["none"].pipeline == microbatches * 2 * 2 * share * 3072 * 2
    assert sent["full"].experts / sent["none"].experts == 3 / 2
    assert sent["full"].tensor / sent["none"].tensor == 7 / 5
    assert sent["full"].data == sent["none"].data
    ends = Parallelism(pp=2, ep=2, dp=2, layers_per_stage=(31, 31))
    two = traffic(FULL, ends, Workload(seq_length=2048, global_batch_size=32))
    assert (two.tensor, two.pipeline) == (0, 16 * 2048 * 3072 * 2)  # one sends forward, the other back
    wide = traffic(FULL, Parallelism(tp=2, dp=4, ep=2, etp=4), Workload(seq_length=2048, global_batch_size=4))
    alone = traffic(FULL, Parallelism(tp=2, dp=4, ep=2, etp=1), Workload(seq_length=2048, global_batch_size=4))
    assert wide.experts - alone.experts == 62 * 2 * 3 * 1024 * 8 * 6 * 3072


def test_time_by_hand() -> None:
    layout = Parallelism(pp=4, ep=8, dp=8, layers_per_stage=(15, 16, 16, 15))
    tokens = 32 * 8 * 2048
    workload = Workload(seq_length=2048, global_batch_size=256)
    step = expected_step(FULL, layout, workload, rate := RATES["H100"])
    assert step.flops == flops_per_token(FULL, 2048) * tokens
    busy = step.flops / 32 / rate
    assert step.seconds == pytest.approx(busy * (16 * 4 / 62) * (1 + 3 / 32))
    assert step.tokens_per_second(workload, layout) == pytest.approx(tokens / 32 / step.seconds)
    again = expected_step(FULL, layout, Workload(seq_length=2048, global_batch_size=256, recompute="full"), rate)
    assert again.seconds == pytest.approx(step.seconds * 4 / 3)
    assert (SEQUENCE, BATCH) == (4096, 1024)
