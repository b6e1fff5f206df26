"""The proof of training as a record: a test of it (`PROOFS`), and how it came out, layout by layout.

    NVIDIA_TF32_OVERRIDE=0 python tests/benchmarks/record_equality.py OUT.json [-k EXPRESSION]
    NVIDIA_TF32_OVERRIDE=0 python tests/benchmarks/record_equality.py OUT.json --layout "tp2 pp2" --layout "dp4 ep4"
    NVIDIA_TF32_OVERRIDE=0 python tests/benchmarks/record_equality.py OUT.json --steps

A row has the largest and the mean error of a tensor, or with `--steps` the largest of ten steps' losses and gradient
norms, over `transformers`' own error in that dtype, both against float64, one rounding granted to both. What is written
appears test by test, so a run that is stopped leaves what it finished. `--layout` is a name of the test's layouts;
where one cannot be run here, that is an error.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import environment

BRIDGE = Path(__file__).parents[1] / "bridge"
PROOFS = {"gradients": BRIDGE / "model" / "test_training.py", "steps": BRIDGE / "training" / "test_layouts.py"}


class Recorder:
    """A pytest plug-in: outcome and recorded properties of every test, in a file; of all layouts, or of some."""

    def __init__(self, out: Path, layouts: Sequence[str] = ()):
        self.out = out
        self.layouts = layouts
        self.rows: dict[str, dict] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not self.layouts:
            return
        named = {item: getattr(item, "callspec", None) and item.callspec.params.get("name") for item in items}
        missing = set(self.layouts) - set(named.values())
        if missing:
            known = sorted({name for name in named.values() if name})
            raise pytest.UsageError(f"--layout: {'; '.join(sorted(missing))} cannot be run here; of {'; '.join(known)}")
        config.hook.pytest_deselected(items=[item for item in items if named[item] not in self.layouts])
        items[:] = [item for item in items if named[item] in self.layouts]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row = {"outcome": report.outcome, **dict(report.user_properties)}
        if report.failed:
            row["said"] = [line for line in report.longreprtext.splitlines() if line.startswith("E")][-20:]
        self.rows[report.nodeid.split("::")[-1]] = row
        self.out.write_text(json.dumps({**self.about(), "rows": self.rows}, indent=1) + "\n")

    @staticmethod
    def about() -> dict:
        facts = environment()
        facts["versions"]["transformers"] = importlib.metadata.version("transformers")
        layer = "nccl, the Transformer Engine spec" if torch.cuda.is_available() else "gloo, the local spec"
        return {**facts, "config": {"ranks": layer, "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE")}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", action="append", default=[])
    parser.add_argument("--steps", dest="proof", action="store_const", const="steps", default="gradients")
    options, others = parser.parse_known_args()
    every = ["-m", "slow or not slow"] if options.layout else []
    recorder = Recorder(options.out, options.layout)
    sys.exit(pytest.main(["-n", "0", "-q", *every, str(PROOFS[options.proof]), *others], plugins=[recorder]))
