"""`minimax-m2 validate`: what it prints, and its exit status. The ranks are forks here; a README starts real ones."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.ranks import RankPool
from typer.testing import CliRunner, Result

from bridge.cli import app
from bridge.proof.judge import judge
from bridge.proof.judge.judge import JudgesRanks

TARGETS = "support.judged_targets"
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(judge, "JudgesRanks", partial(JudgesRanks, RankPool))
    return lambda *arguments: CliRunner().invoke(app, ["validate", *arguments])


def test_0_where_everything_holds(run: Run) -> None:
    result = run("bridge:minimax_m2_layer_spec", "--tp", "1")
    assert result.exit_code == 0, result.output
    assert "bridge:minimax_m2_layer_spec: layer spec, float32" in result.stdout
    assert "nothing of" in result.stdout


def test_1_with_a_table_worst_first_and_the_sentence(run: Run) -> None:
    result = run(f"{TARGETS}:gate_and_up_swapped", "--tp", "1")
    assert result.exit_code == 1, result.output
    assert "differs" in result.stdout
    assert "gate and up exchanged: The activation is applied to w3's half" in result.stdout
    assert result.stdout.count("exchanged") == 1
    shown = [
        float(word) for line in result.stdout.splitlines() for word in line.split() if word[1:2] == "." and "e" in word
    ]
    errors = [value for value in shown if value > 1e-4]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)


def test_json_says_the_same(run: Run) -> None:
    result = run(f"{TARGETS}:with_a_bias", "--tp", "1", "--json")
    assert result.exit_code == 1, result.output
    said = json.loads(result.stdout)
    (layout,) = said["layouts"]
    assert said["status"] == layout["status"] == "differs"
    assert [fault["name"] for fault in said["faults"]] == layout["faults"] == ["unknown parameters"]
    assert "decoder.layers.*.self_attention.linear_proj.bias" in said["faults"][0]["sentence"]
    assert layout["differing"] == {}
    assert layout["failure"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((f"{TARGETS}:raises_inside", "--tp", "1"), "it raises KeyError: 'planted'"),
        ((f"{TARGETS}:of_transformer_engine", "--tp", "1"), "it needs Transformer Engine and a GPU"),
        (("no_module:spec", "--tp", "1"), "no_module: cannot be imported"),
        (("spec",), "expected package.module:function"),
        (("a:b", "--layouts", "most"), "--layouts most: expected quick or full"),
        (("a:b", "--layouts", "full", "--tp", "2"), "give the sizes of one layout, or a set"),
        (("a:b", "--part", "head"), "expected q_norm, k_norm, router or attention"),
        ((str(Path(__file__).parent),), "a checkpoint needs --source"),
    ],
)
def test_2_where_nothing_was_judged(arguments: tuple[str, ...], said: str, run: Run) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())


def test_2_where_a_layout_cannot_be_run(run: Run) -> None:
    """And 1 if another differs (tests/bridge/proof/judge)."""
    result = run(f"{TARGETS}:per_head_norms", "--tp", "2")
    assert result.exit_code == 2, result.output
    assert "tp 2: cannot be run: its norms are megatron-core's WrappedTorchNorm" in " ".join(result.stdout.split())


def test_what_cannot_be_found_is_looked_for_in_the_current_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("from support.judged_targets import makes_a_number as spec")
    result = run("mine:spec", "--tp", "1")
    assert "mine:spec: makes a int" in " ".join(result.stderr.split())
