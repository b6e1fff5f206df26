"""What is planned is within a tenth of what recorded runs had of a GPU's memory at most, with activations."""

import json
import sys
from typing import Any

import pytest
from support.checks import RESULTS

from bridge.memory_plan.plan import layout, plan
from bridge.model.fusions import FUSIONS
from reference.activations import Workload

sys.path.insert(0, str(RESULTS.parent))
from train_rows import TRUE_WIDTH

pytestmark = pytest.mark.usefixtures("types_unchecked")

BOTH = {"megatron-bridge", "fusions and graphs"}
RECORDS = {  # and rows that they have, at least
    "train_speed_h100": BOTH,
    "train_speed_h200": BOTH,
    "train_speed_h200_other_host": BOTH,
    "train_speed_h200_fusions": {"fusions and graphs", "graphs", *(f"graphs, {name}" for name in FUSIONS)},
    "train_speed_h200_ep2": BOTH,
}
SIZES = ("tp", "pp", "ep", "etp", "cp")


def planned(config: dict[str, Any]) -> float:
    """GB of the rank that needs most, of a record's configuration."""
    model = TRUE_WIDTH.config(config["ep"])
    assert model.num_local_experts == config["experts"]
    parallelism = layout(model, gpus=config["ranks"], **{name: config[name] for name in SIZES})
    workload = Workload(seq_length=config["seq"], global_batch_size=config["microbatches"] * config["dp"])
    return plan(model, parallelism, memory=10**12, workload=workload).largest / 1e9


@pytest.mark.parametrize("name", RECORDS)
def test_plans_are_within_a_tenth_of_recorded_peaks(name: str) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    wanted = planned(record["config"])
    peaks = {row: line["peak GB"] for row, line in record["rows"].items() if "peak GB" in line}
    assert RECORDS[name] <= peaks.keys()
    assert peaks == {row: pytest.approx(wanted, rel=0.1) for row in peaks}
