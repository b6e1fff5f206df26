"""The recorder of 200 steps: what it says of rows, and a run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from record_steps import apart

RECORD_STEPS = Path(__file__).with_name("record_steps.py")


def test_a_row_is_compared_with_its_own_one() -> None:
    eager = {"loss": [4.0, 2.0, 1.0], "grad_norm": [1.0, 1.0, 1.0]}
    graphs = {"loss": [4.0, 2.5, 1.0], "grad_norm": [1.0, 1.0, 1.0]}
    found = apart({"eager": eager, "graphs": graphs, "fusions": {"failed": ["no"]}, "fusions and graphs": graphs})
    assert found == {
        "graphs, off eager": {
            "loss": {"first ten": 0.25, "all": 0.25, "equal steps": 1},
            "grad_norm": {"first ten": 0.0, "all": 0.0, "equal steps": 3},
        }
    }


@pytest.mark.slow
def test_two_runs_on_a_processor_are_equal(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    subprocess.run([sys.executable, str(RECORD_STEPS), str(out), "--steps", "6"], check=True)
    record = json.loads(out.read_text())
    assert set(record["rows"]) == {"eager", "eager again"}
    assert record["apart"]["eager again, off eager"]["loss"]["equal steps"] == 6
    assert record["rows"]["eager"]["loss"][-1] < record["rows"]["eager"]["loss"][0]
