"""The fixture in somebody's own tests: another pytest, in a folder of theirs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]
CONFTEST = 'pytest_plugins = ["bridge.proof.judge.pytest_plugin"]\n'
TESTS = """
from bridge.proof.judge.layouts import layout_of

ONE = [layout_of()]


def test_right(matches_reference):
    assert matches_reference("bridge:minimax_m2_layer_spec", layouts=ONE).status == "holds"


def test_wrong(matches_reference):
    matches_reference("support.judged_targets:gate_and_up_swapped", layouts=ONE)
"""


def test_the_fixture_judges_with_the_same_ranks(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_mine.py").write_text(TESTS)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "gate and up exchanged" in done.stdout
