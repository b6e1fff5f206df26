"""The command, as a user runs it: what it prints, what it leaves behind, and its exit status."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.checkpoints import all_tensors, edit_tensors
from typer.testing import CliRunner

import bridge.cli.prove
import bridge.proof.roundtrip
from bridge.cli import app
from bridge.proof import transformers_logits

COMMAND = [str(Path(sys.executable).with_name("minimax-m2"))]
NORM = "model.norm.weight"


def test_demo_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = subprocess.run([*COMMAND, "demo", "--keep", str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    text = " ".join(result.stdout.split())
    for words in ("megatron-core GPTModel", "transformers", "bytes: exported = source"):
        assert words in text
    assert text.count("holds") == 4
    assert "FAILS" not in text
    assert "skipped" not in text
    source, exported = all_tensors(tmp_path / "source"), all_tensors(tmp_path / "exported")
    assert source.keys() == exported.keys()
    assert all(torch.equal(source[name].view(torch.uint8), exported[name].view(torch.uint8)) for name in source)


def test_packages_that_are_too_old_are_not_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 rotates every channel: its logits would be called wrong, and ours with them."""
    found = {"transformers": "5.17.3"}

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(transformers_logits, "version", version)
    assert transformers_logits.missing_packages() == ["transformers >= 5.18", "accelerate >= 1"]
    found |= {"transformers": "5.18.0", "accelerate": "1.14.0"}
    assert transformers_logits.missing_packages() == []


@pytest.mark.slow  # tests/bridge/weights/test_layouts.py has the same proof on ranks that start at once
@pytest.mark.parametrize("options", [["--ep", "2"], ["--pp", "2", "--model", "hybrid"]], ids=" ".join)
def test_demo_on_torchruns_ranks(options: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launcher, *COMMAND, "demo", *options]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("holds") == 4
    assert "FAILS" not in result.stdout


def test_parallel_sizes_need_their_ranks(checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["roundtrip", str(checkpoint), "--tp", "2", "--ep", "4"])
    assert result.exit_code == 2
    assert "must be a multiple of 2, and of 4 experts' ranks x 1 for each expert; found 1" in " ".join(
        result.output.split()
    )
    result = CliRunner().invoke(app, ["roundtrip", str(checkpoint), "--pp", "2"])
    assert result.exit_code == 2
    assert "the number of ranks, over 2 stages, must be a multiple of 1" in " ".join(result.output.split())


@pytest.mark.parametrize(("what", "gpus"), [("norm", 1), ("norm", 2), ("load", 1), ("fp8", 1), ("offline", 1)])
def test_bench_starts_its_script(what: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is there, for as many ranks, and whose failure is the command's."""
    started = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(bridge.cli.prove.subprocess, "run", run)
    result = CliRunner().invoke(app, ["bench", what, "out.json", "--gpus", str(gpus)])
    assert result.exit_code == 3, result.output
    (command,) = started
    script = command[-2]
    assert Path(script).name == f"bench_{what}.py"
    assert Path(script).is_file()
    assert command[-1] == "out.json"
    assert command[1:-2] == (["-m", "torch.distributed.run", "--nproc-per-node", "2"] if gpus == 2 else [])


def test_bench_layer_measures_the_class_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        bridge.cli.prove.subprocess,
        "run",
        lambda command, check: started.append(command) or SimpleNamespace(returncode=0),
    )
    assert CliRunner().invoke(app, ["bench", "layer", "out.json", "--model", "hybrid"]).exit_code == 0
    assert [command[-2:] for command in started] == [["out.json", "hybrid"]]


@pytest.mark.parametrize("found", [0, 2])
def test_bench_train_starts_its_own_ranks(found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a GPU, where they are gloo's."""
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(
        bridge.cli.prove.subprocess,
        "run",
        lambda command, check: started.append(command) or SimpleNamespace(returncode=0),
    )
    assert CliRunner().invoke(app, ["bench", "train", "out.json", "--gpus", "2", "--profile"]).exit_code == 0
    ((_, script, *options),) = started
    assert Path(script).name == "bench_train.py"
    given = arguments_of(script)(options)
    assert (given.out, given.ranks, given.ep, given.profile) == (Path("out.json"), 2, 2, True)


def arguments_of(script: str) -> Callable:
    """How a benchmark reads its command line."""
    return runpy.run_path(script, run_name="imported")["arguments"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fp8", "--model", "hybrid"], "--model hybrid: bench fp8 measures no layers"),
        (["norm"], "bench norm needs NVIDIA GPUs: 1, found 0"),
        (["load", "--gpus", "2"], "bench load needs NVIDIA GPUs: 2, found 0"),
        (["fp8", "--gpus", "2"], "--gpus 2: bench fp8 runs in one process"),
        (["load", "--profile"], "--profile: bench load makes no training steps"),
    ],
)
def test_bench_says_what_it_lacks(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    what, *options = arguments
    result = CliRunner().invoke(app, ["bench", what, "out.json", *options])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def failing_claims(checkpoint: Path, *options: str) -> list[str]:
    result = CliRunner().invoke(app, ["roundtrip", str(checkpoint), "--dtype", "fp32", "--json", *options])
    assert result.exit_code == 1, result.output
    findings = json.loads(result.stdout)["findings"]
    return [finding["claim"] for finding in findings if not finding["holds"]]


def test_roundtrip_fails_when_a_byte_differs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn one bit between export and comparison: the proof must not hold."""
    real = bridge.proof.roundtrip.roundtrip

    def sabotaged(source, out, *args, **kwargs):
        save = source.save_hf_pretrained

        def save_and_damage(*save_args, **save_kwargs) -> None:
            save(*save_args, **save_kwargs)
            edit_tensors(out, lambda t: t[NORM].view(torch.int16).__ixor__(1))

        source.save_hf_pretrained = save_and_damage
        return real(source, out, *args, **kwargs)

    monkeypatch.setattr(bridge.proof.roundtrip, "roundtrip", sabotaged)
    assert failing_claims(checkpoint) == ["bytes: exported = source", "bytes differ"]


def test_roundtrip_fails_when_logits_differ(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megatron-core model with one norm weight off by 1 % must be found out."""
    real = bridge.proof.roundtrip.megatron_logits

    def disturbed(model, *args):
        with torch.no_grad():
            model.decoder.layers[0].input_layernorm.weight[7] *= 1.01
        try:
            return real(model, *args)
        finally:
            with torch.no_grad():
                model.decoder.layers[0].input_layernorm.weight[7] /= 1.01

    monkeypatch.setattr(bridge.proof.roundtrip, "megatron_logits", disturbed)
    assert failing_claims(checkpoint) == ["logits: megatron-core GPTModel = reference"]
    assert failing_claims(checkpoint, "--model", "hybrid") == ["logits: megatron-core HybridModel = reference"]


@pytest.mark.parametrize("model", ["gpt", "hybrid"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_roundtrip_keeps_what_it_writes_where_it_is_told(
    checkpoint: Path, tmp_path: Path, dtype: str, model: str
) -> None:
    out = tmp_path / "deep" / "out"
    options = ["--out", str(out), "--dtype", dtype, "--model", model]
    result = CliRunner().invoke(app, ["roundtrip", str(checkpoint), *options])
    assert result.exit_code == 0, result.output
    assert all_tensors(out).keys() == all_tensors(checkpoint).keys()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_inspect_describes_a_whole_checkpoint(checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for words in (
        "minimax_m2",
        "5 of width 72, top 2",
        "6 query and 2 key/value heads of 48",
        "128x128",
        "2 tensors, carr",
    ):
        assert words in text
    assert "whole" in text


def test_inspect_lists_every_problem(copy: Path) -> None:
    edit_tensors(copy, lambda t: (t.pop(NORM), t.update({"extra.weight": torch.ones(2)})))
    result = CliRunner().invoke(app, ["inspect", str(copy)])
    assert result.exit_code == 1
    assert f"{NORM}: missing" in result.stdout
    assert "extra.weight: unknown tensor" in result.stdout
    assert "2 problems" in result.stdout


def test_bad_input_is_one_message_and_status_2(tmp_path: Path) -> None:
    for verb in ("inspect", "roundtrip"):
        result = CliRunner().invoke(app, [verb, str(tmp_path / "none")])
        assert result.exit_code == 2
        assert "no such folder" in result.stderr
        assert result.stdout == ""


def test_help_and_inspect_do_not_load_megatron(checkpoint: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from bridge.cli import app;"
        f"result = CliRunner().invoke(app, ['inspect', {str(checkpoint)!r}]);"
        "print(result.exit_code, 'megatron' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", "False"]
