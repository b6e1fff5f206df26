"""What is planned is within a tenth of what recorded runs had of a GPU's memory at most, with activations."""

import json
from pathlib import Path
from typing import Any

import pytest

from bridge.memory_plan.plan import layout, plan
from reference.activations import Workload
from reference.config import ModelConfig

pytestmark = pytest.mark.usefixtures("types_unchecked")

RESULTS = Path(__file__).parents[3] / "tests" / "benchmarks" / "results"
RECORDS = ("train_speed_h100", "train_speed_h200", "train_speed_h200_ep2")
SIZES = ("tp", "pp", "ep", "etp", "cp")


def planned(config: dict[str, Any]) -> float:
    """GB of the rank that needs most, of a record's configuration."""
    model = ModelConfig(
        hidden_size=config["hidden"],
        intermediate_size=config["width"],
        num_attention_heads=config["heads"],
        num_key_value_heads=config["groups"],
        head_dim=config["head_dim"],
        rotary_dim=config["rotary"],
        num_local_experts=config["experts"],
        num_experts_per_tok=config["top_k"],
        vocab_size=config["vocab"],
        num_hidden_layers=config["layers"],
    )
    workload = Workload(seq_length=config["seq"], global_batch_size=config["microbatches"] * config["dp"])
    sizes = {name: config[name] for name in SIZES}
    parallelism = layout(model, gpus=config["ranks"], **sizes)
    return plan(model, parallelism, memory=10**12, workload=workload).largest / 1e9


@pytest.mark.parametrize("name", RECORDS)
def test_plans_are_within_a_tenth_of_recorded_peaks(name: str) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    wanted = planned(record["config"])
    peaks = {row: line["peak GB"] for row, line in record["rows"].items() if "peak GB" in line}
    assert {"defaults", "fusions and graphs"} <= peaks.keys()
    assert peaks == {row: pytest.approx(wanted, rel=0.1) for row in peaks}
