"""The script for many GPUs: its layouts are those that are tested, and its blocks write what they ran and what not."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_train
import scaling
from bench_load import layout_of
from train_rows import ROWS, TINY

from bridge.memory_plan.plan import layout
from reference.parallelism import Parallelism

SETUPS = Path(__file__).parents[1] / "bridge" / "model" / "test_training.py"


def test_proven_layouts_are_those_of_the_test() -> None:
    found = runpy.run_path(str(SETUPS), run_name="imported")["SETUPS"]
    assert {name: found[name].layout.world_size for name in scaling.PROVEN} == scaling.PROVEN
    lacking = [name for name in scaling.PROVEN if found[name].layout.cp > 1]
    assert lacking == list(scaling.NEEDS_TE)


def test_layouts_of_loading_are_of_their_ranks() -> None:
    for ranks, layouts in scaling.LOADED.items():
        assert [layout_of(words, ranks).world_size for words in layouts] == [ranks] * len(layouts)
    assert layout_of("tp=2,ep=4", 4) == Parallelism(tp=2, dp=2, ep=4, etp=1)


@pytest.mark.parametrize("name", scaling.SPEED)
def test_runs_of_speed_are_read_by_the_benchmark_and_fit_their_ranks(name: str) -> None:
    command = scaling.speed(8, gpu=True)[name].command
    given = bench_train.arguments([word.format(out="out.json") for word in command[2:]])
    ranks, sizes = scaling.SPEED[name]
    assert (given.ranks, given.rows) == (ranks, list(scaling.SPEED_ROWS))
    found = {key: getattr(given, key) for key in bench_train.SIZES}
    assert {key: size for key, size in found.items() if size > 1} == sizes
    assert layout(TINY.config(given.ep), gpus=ranks, **found).world_size == ranks
    assert set(given.rows) <= ROWS.keys()


def test_a_block_has_only_layouts_that_its_ranks_can_run() -> None:
    (two,) = scaling.proof(2, gpu=True).values()
    assert two.ranks == 2
    assert two.command[-6:] == ["--layout", "tp2", "--layout", "tp2 ep2", "--layout", "pp2"]
    (eight,) = scaling.proof(8, gpu=True).values()
    assert {*scaling.PROVEN} == {*eight.command[4::2]}
    (without,) = scaling.proof(8, gpu=False).values()
    assert {*scaling.PROVEN} - {*without.command[4::2]} == {"tp2 cp2"}


def test_weak_scaling_is_speed_per_gpu_over_one_gpus() -> None:
    def run(ranks: int, **speeds: float) -> dict:
        return {"ranks": ranks, "result": {"rows": {row: {"tokens/s": speed} for row, speed in speeds.items()}}}

    runs = {"ep 1": run(1, a=100.0, b=50.0), "ep 2": run(2, a=180.0), "ep 4": {"not run": "needs 4 ranks"}}
    assert scaling.weak_scaling(runs) == {"a": {"ep 1": 1.0, "ep 2": 0.9}, "b": {"ep 1": 1.0}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs it takes minutes")
def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    assert scaling.main(["norm", str(tmp_path / "norm.json"), "--ranks", "4"]) == 0
    found = json.loads((tmp_path / "norm.json").read_text())
    assert found["runs"] == {
        "tp 2": {"not run": "needs GPUs"},
        "tp 4": {"not run": "needs GPUs"},
        "tp 8": {"not run": "needs 8 ranks, and there are 4"},
    }
    assert {"date", "hardware", "versions"} <= found.keys()
    with pytest.raises(SystemExit, match=r"--runs: tp 3 is not in norm; of tp 2, tp 4, tp 8"):
        scaling.main(["norm", str(tmp_path / "norm.json"), "--runs", "tp 3"])


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    words = "import sys; print('nothing to be done'); sys.exit(3)"
    failed = scaling.make_run(scaling.Run(1, [sys.executable, "-c", words, "{out}"]), tmp_path, limit=60)
    assert (failed["status"], failed["said"], failed["result"]) == (3, ["nothing to be done"], None)
    hung = scaling.make_run(scaling.Run(1, [sys.executable, "-c", "import time; time.sleep(60)"]), tmp_path, limit=0.3)
    assert hung["status"] == "ended after 0.3 s"
    words = "import json, sys; json.dump(dict(rows=1), open(sys.argv[1], 'w'))"
    well = scaling.make_run(scaling.Run(1, [sys.executable, "-c", words, "{out}"]), tmp_path, limit=60)
    assert (well["status"], well["result"]) == (0, {"rows": 1})
    assert "said" not in well
