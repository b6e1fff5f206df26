"""`minimax-m2 train` and `plot` as a user runs them: flags, YAML, a dry run, JSON, the picture; a rank that dies."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.commands import ENVIRONMENT
from support.training_runs import TEXT
from typer.testing import CliRunner

from bridge.cli import app
from bridge.model.fusions import FASTEST
from bridge.training.checkpoints import latest_step
from bridge.training.metrics import flops_per_token, peak_of, read_metrics
from bridge.training.settings import setting_fields
from reference.config import ModelConfig

TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMAND = str(Path(sys.executable).with_name("minimax-m2"))


def run(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.output


def arguments(source: Path, out: Path) -> list[object]:
    return ["train", "--model", source, "--data", TEXT, "--out", out, "--steps", 4, "--seq-length", 32]


def test_every_setting_is_an_option_with_help() -> None:
    shown = " ".join(re.sub(r"[│─╭╮╰╯\n]", " ", run("train", "--help")).split())
    for name in setting_fields():
        assert f"--{name.replace('_', '-')}" in shown


def test_flags_win_over_yaml_and_a_run_writes_what_it_says(source: Path, tmp_path: Path) -> None:
    lines = [f"model: {source}", "steps: 3", "seq_length: 32", "lr: 1e-3", "dtype: fp32", "export: bf16", ""]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    text = run("train", "--config", tmp_path / "run.yaml", "--out", tmp_path / "run", "--steps", 2, "--data", TEXT)
    assert "step      2  loss" in text
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert {"loss", "grad_norm", "lr", "tokens_per_second", "aux_loss", "expert_load", "memory_gb"} <= lines[0].keys()
    assert all(line["tokens_per_second"] > 0 and line["expert_load"] >= 1 for line in lines)
    assert lines[0]["lr"] == 1e-3
    again = run("train", "--config", tmp_path / "run.yaml", "--out", tmp_path / "run", "--data", TEXT, status=2)
    assert "with setting steps = 2, and now it is 3" in " ".join(again.split())
    found = json.loads(run("inspect", tmp_path / "run" / "export", "--json"))
    assert found["problems"] == []


def test_an_interrupted_run_says_what_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = arguments(source, tmp_path / "run")
    run(*words, "--until", 1)
    again = run(*words, "--until", 1)
    assert "step 1 was done before" in again

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bridge.training.train.run_steps", interrupt)
    said = " ".join(run(*words, status=128 + signal.SIGINT).split())
    assert "interrupted: the checkpoint of step 1 is kept, and the same command goes on from there" in said
    said = " ".join(run(*arguments(source, tmp_path / "other"), status=128 + signal.SIGINT).split())
    assert "interrupted: there is no checkpoint yet, and the same command begins anew" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=str)
def test_a_signal_ends_a_run_with_a_checkpoint(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    """And the same command goes on."""
    folder = tmp_path / "run"
    words = [str(one) for one in arguments(source, folder)]
    words[words.index("--steps") + 1] = "4000"
    same_devices = {name: value for name, value in ENVIRONMENT.items() if name != "CUDA_VISIBLE_DEVICES"}
    process = subprocess.Popen([COMMAND, *words], env=os.environ | same_devices, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() or len(read_metrics(folder)) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    for _ in range(3):  # a scheduler to all, and torchrun to its ranks
        process.send_signal(number)
        time.sleep(0.02)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, said
    last = read_metrics(folder)[-1]["step"]
    assert f"stopped: the checkpoint of step {last} is kept, and the same command goes on from there" in said
    assert latest_step(folder / "checkpoints") == last
    again = run(*words, "--until", last + 1)
    assert f"steps {last + 1} to {last + 1} are done" in again


def test_a_lost_rank_is_no_bug(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise RuntimeError("[pair.cc:544] Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr("bridge.training.train.run_steps", lose)
    said = " ".join(run(*arguments(source, tmp_path / "run"), status=2).split())
    assert "error: the connection to another rank is lost" in said
    assert "a bug" not in said


def test_json_is_one_object(source: Path, tmp_path: Path) -> None:
    found = json.loads(run(*arguments(source, tmp_path / "run"), "--until", 1, "--json"))
    assert (found["first"], found["last"]) == (0, 1)
    assert found["loss"] == read_metrics(tmp_path / "run")[0]["loss"]


def test_a_dry_run_says_what_would_be_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    words = [*arguments(source, tmp_path / "run"), "--dry-run", "--gpus", 4, "--tp", 2, "--etp", 1, "--ep", 2]
    found = json.loads(run(*words, "--json"))
    assert found["fits"]
    assert (found["settings"]["dp"], found["settings"]["microbatches"], found["settings"]["lr"]) == (2, 4, 1e-5)
    assert found["plan"]["workload"]["seq_length"] == found["settings"]["seq_length"]
    counted = [rank["with_distributed_optimizer"]["activations"] for rank in found["plan"]["ranks"]]
    assert min(counted) > 0
    recomputed = json.loads(run(*words, "--recompute", "full", "--json"))["plan"]
    assert recomputed["largest"] < found["plan"]["largest"]
    assert "starts from" in run(*words)
    run(*words, "--memory", "0.1MB", status=1)
    assert "gpus (3) must be a positive multiple" in run(*words[:-6], "--gpus", 3, "--tp", 2, status=2)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_dtype_and_says_what_it_does_not_count(source: Path, tmp_path: Path) -> None:
    words = [*arguments(source, tmp_path / "run"), "--dry-run", "--gpus", 1]
    narrow, wide = (json.loads(run(*words, "--dtype", dtype, "--json")) for dtype in ("bf16", "fp32"))
    (a,), (b,) = (found["plan"]["ranks"] for found in (narrow, wide))
    assert a["parameters"] == b["parameters"]
    trained = a["parameters"]["dense"] + a["parameters"]["expert"]
    a, b = a["with_distributed_optimizer"], b["with_distributed_optimizer"]
    changes = {name: b[name] - a[name] for name in ("weights", "gradients", "optimizer")}
    assert changes == {"weights": 2 * trained, "gradients": 0, "optimizer": -4 * trained}
    assert b["activations"] > a["activations"]
    assert "float32 attention's probabilities" in wide["plan"]["not_counted"]
    frozen = "frozen parameters are counted as if they were trained, with gradient and optimizer state"
    assert json.loads(run(*words, "--freeze", "*.experts.*", "--json"))["notes"][-1] == frozen
    assert frozen in " ".join(run(*words, "--freeze", "*.experts.*").split())


def test_a_dry_run_names_layouts_that_fit_where_its_own_does_not(source: Path, tmp_path: Path) -> None:
    words = [*arguments(source, tmp_path / "run"), "--dry-run", "--gpus", 4]
    plan = json.loads(run(*words, "--json"))["plan"]
    for part, shown in ((0.98, "layouts of 4 GPUs that fit"), (0.3, "layouts of 8 GPUs that fit")):
        memory = f"{plan['largest'] * part / 1e6:.6f}MB"
        found = json.loads(run(*words, "--memory", memory, "--json", status=1))["plan"]["advice"]
        said = " ".join(run(*words, "--memory", memory, status=1).split())
        assert shown in said
        assert found["fits"][0]["options"][:12] in said


def test_a_dry_run_of_other_hosts_takes_them_to_have_gpus(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [*arguments(source, tmp_path / "run"), "--dry-run", "--json"]
    there = json.loads(run(*words, "--gpus", 16, "--cp", 2))
    assert there["settings"]["cuda_graphs"]
    assert tuple(there["settings"]["fusions"]) == FASTEST
    assert "fusions and cuda_graphs are those of hosts with GPUs and Transformer Engine" in there["notes"][0]
    here = json.loads(run(*words))
    assert (here["settings"]["cuda_graphs"], here["settings"]["fusions"], here["notes"]) == (False, ["none"], [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "needs Transformer Engine's attention" in run(*words, "--cp", 2, status=2)


def test_a_dry_run_refuses_what_a_run_refuses(source: Path, tmp_path: Path) -> None:
    """A run that was begun with another learning rate, a folder in the source, names that fit no parameter."""
    begun = arguments(source, tmp_path / "run")
    run(*begun, "--until", 1)
    assert f"step 1 of the run in {tmp_path / 'run'}" in run(*begun, "--dry-run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refused = {
        "begun with setting lr = 1e-05, and now it is 0.1": [*begun, "--lr", 0.1],
        "run: lies inside": arguments(source, source / "run"),
        "holds thesis.txt and no run.json": arguments(source, tmp_path / "full"),
        "found a file, expected a folder": arguments(source, tmp_path / "full" / "thesis.txt"),
        "no tokenizer can be made of this": [*arguments(source, tmp_path / "new"), "--tokenizer", tmp_path / "full"],
        "no parameter fits 'nope'": [*arguments(source, tmp_path / "new"), "--freeze", "nope"],
    }
    for words, command in refused.items():
        assert words in " ".join(run(*command, "--dry-run", status=2).split())


def test_an_unknown_setting_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {source}\nlearning_rate: 1\n")
    said = " ".join(run("train", "--config", tmp_path / "run.yaml", "--out", "o", status=2).split())
    assert "run.yaml: unknown setting 'learning_rate'" in said


def test_model_flops_are_six_times_the_weights_a_token_goes_through() -> None:
    """Of the released model, without attention over the sequence: 6 x the 10 billion active parameters."""
    active = flops_per_token(ModelConfig(rotary_dim=64), 0) / 6
    assert active == pytest.approx(10e9, rel=0.06)


PEAKS_OF = {
    "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12, "NVIDIA H200 NVL": 835.5e12, "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA B200": 2250e12, "NVIDIA GB200": 2500e12,
    "NVIDIA RTX A1000": None, "NVIDIA H20": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
}  # fmt: skip


@pytest.mark.parametrize("name", PEAKS_OF)
def test_the_peak_is_that_of_the_device(name: str) -> None:
    assert peak_of(name) == PEAKS_OF[name]


def curve(run: Path, losses: list[float]) -> Path:
    run.mkdir()
    lines = [{"step": n, "loss": loss, "grad_norm": 1.0, "tokens_per_second": 9.0} for n, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_draws_each_run(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="the extra train is not installed")
    one, two = curve(tmp_path / "one", [3.0, 2.0]), curve(tmp_path / "two", [3.0, 1.0, 0.5])
    out = tmp_path / f"curves.{suffix}"
    run("plot", one, two, "--out", out)
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert out.read_bytes().startswith(start)
    run("plot", one, "--out", tmp_path / f"alone.{suffix}")
    assert (tmp_path / f"alone.{suffix}").read_bytes() != out.read_bytes()


def test_plot_shows_names_of_runs_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra train is not installed")
    names = ["_hidden", "a$_b$", "$x^$"]
    runs = [curve(tmp_path / name, [3.0, 2.0]) for name in names]
    for given in (runs, [run.relative_to(tmp_path) for run in runs]):
        with contextlib.chdir(tmp_path):
            run("plot", *given, "--out", tmp_path / "curves.svg")
        shown = (tmp_path / "curves.svg").read_text()
        assert [one for one in given if f"<!-- {one} -->" not in shown] == []


def test_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    assert "no such file; give the folder of a run" in " ".join(run("plot", tmp_path, status=2).split())
    assert "ends in .png or .svg" in " ".join(run("plot", tmp_path, "--out", "a.pdf", status=2).split())


def test_tensorboard_has_the_metrics(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra train is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(*arguments(source, tmp_path / "run"), "--until", 2)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    found = [event.value for event in board.Scalars("loss")]
    assert torch.tensor(found).tolist() == pytest.approx([line["loss"] for line in read_metrics(tmp_path / "run")])


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_the_same_command_goes_on(source: Path, tmp_path: Path) -> None:
    """torchrun ends the others; the next start goes on from the newest checkpoint."""
    words = [str(one) for one in arguments(source, tmp_path / "run")]
    words[words.index("--steps") + 1] = "40"
    launch = [*TWO_RANKS, "--no-python", COMMAND, *words, "--save-every", "1", "--ep", "2", "--dtype", "fp32"]
    environment = os.environ | ENVIRONMENT
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(launch, env=environment, stdout=log, stderr=log)
    until = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoints" / "iter_0000003").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < until
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(120) != 0
    again = [*launch, "--until", "6"]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")][-1] >= 6
