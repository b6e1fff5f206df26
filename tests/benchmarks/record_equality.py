"""The proof of training as a record: `tests/bridge/model/test_training.py`, and how it came out, layout by layout.

    NVIDIA_TF32_OVERRIDE=0 python tests/benchmarks/record_equality.py OUT.json [-k EXPRESSION]

A row has the largest and the mean error of a tensor over `transformers`' own error in that dtype, both against float64,
one rounding granted to both. What is written appears test by test, so a run that is stopped leaves what it finished.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import environment

PROOF = Path(__file__).parents[1] / "bridge" / "model" / "test_training.py"


class Recorder:
    """A pytest plug-in: outcome and recorded properties of every test, in a file."""

    def __init__(self, out: Path):
        self.out = out
        self.rows: dict[str, dict] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.rows[report.nodeid.split("::")[-1]] = {"outcome": report.outcome, **dict(report.user_properties)}
        self.out.write_text(json.dumps({**self.about(), "rows": self.rows}, indent=1) + "\n")

    @staticmethod
    def about() -> dict:
        facts = environment()
        facts["versions"]["transformers"] = importlib.metadata.version("transformers")
        layer = "nccl, the Transformer Engine spec" if torch.cuda.is_available() else "gloo, the local spec"
        return {**facts, "config": {"ranks": layer, "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE")}}


if __name__ == "__main__":
    sys.exit(pytest.main(["-n", "0", "-q", str(PROOF), *sys.argv[2:]], plugins=[Recorder(Path(sys.argv[1]))]))
