"""What is refused before any weight is read, and in which words; and a loss that is not finite."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from support.checkpoints import edit_tensors
from support.training_runs import TEXT, job_of, make_source

from bridge.jobs import alone
from bridge.model.layer_spec import Backend, default_backend
from bridge.training import train as training
from bridge.training.checks import check_layout
from bridge.training.dry_run import dry_run
from bridge.training.loop import NotFiniteError
from bridge.training.settings import TrainJob, read_yaml
from bridge.training.train import train


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets as far as the model fails in other words than those expected."""

    def build(*_: object, **__: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(training, "build", build)


def lines(path: Path, *objects: object) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return str(path)


def indexed(path: Path, ids: list[int]) -> str:
    builder = IndexedDatasetBuilder(str(path), dtype=np.int32)
    builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(path.with_suffix(".idx")))
    return str(path)


# What is given as data in a folder, and what the error says.
DATA: dict[str, tuple[Callable[[Path], str], str]] = {
    "no file": (lambda at: str(at / "a.jsonl"), r"a\.jsonl: no such file"),
    "another kind": (lambda at: lines(at / "a.csv", 1), r"expected a file that ends in \.jsonl, \.txt, \.bin"),
    "nothing in it": (lambda at: lines(at / "a.jsonl"), r"is empty"),
    "no index": (lambda at: lines(at / "a.bin", 1), r"its index a\.idx is not beside it"),
    "no JSON": (lambda at: str((at / "a.jsonl").write_text("{nothing") and at / "a.jsonl"), r"line 1: is not JSON"),
    "no object": (lambda at: lines(at / "a.jsonl", {"text": "a"}, [1]), r"line 2: expected an object, found list"),
    "no known key": (lambda at: lines(at / "a.jsonl", {"prompt": "a"}), r"one of the keys text, .*found prompt"),
    "too little": (lambda at: lines(at / "a.jsonl", {"tokens": [1] * 32}), r"has 32 tokens, fewer than one sequence"),
    "a token too high": (
        lambda at: lines(at / "a.jsonl", {"tokens": [1] * 99}, {"tokens": [260]}),
        r"line 2: token 260, and the model's vocabulary has 0 to 259",
    ),
    "a token too high in .bin": (lambda at: indexed(at / "a.bin", [1] * 99 + [300]), r"token 300, and the model's"),
    "no assistant": (
        lambda at: lines(at / "a.jsonl", {"messages": [{"role": "user", "content": "a"}]}),
        r"line 1: no message is the assistant's",
    ),
    "text after tokens": (
        lambda at: lines(at / "a.jsonl", {"tokens": [1] * 99}, {"text": "a"}),
        r"line 2: is text, and the first line of the file has token ids",
    ),
    "a folder": (lambda at: str((at / "a.jsonl").mkdir() or at / "a.jsonl"), r"a\.jsonl: is a folder"),
    "packed": (lambda at: lines(at / "a.jsonl.gz", 1), r"expected a file that ends in .*; unpack it"),
    "a number that no token has": (
        lambda at: lines(at / "a.jsonl", {"tokens": [1] * 99}, {"tokens": [2**70]}),
        rf"line 2: {2**70} is a token of no vocabulary",
    ),
    "half of a character": (lambda at: lines(at / "a.jsonl", {"text": "a\ud800"}), r"line 1: '\\ud800' is half of a"),
    "nested without end": (
        lambda at: str((at / "a.jsonl").write_text('{"text":' + "[" * 100_000) and at / "a.jsonl"),
        r"line 1: is not JSON",
    ),
    "nothing trained": (
        lambda at: indexed(at / "a.bin", [-5] * 99),
        r"a\.bin: no token in it is trained on",
    ),
    "bytes that are no text": (
        lambda at: str((at / "a.txt").write_bytes(b"\xff" * 99) and at / "a.txt"),
        r"a\.txt: is not UTF-8",
    ),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", DATA)
def test_data(source: Path, tmp_path: Path, name: str) -> None:
    make, words = DATA[name]
    with pytest.raises(ValueError, match=words):
        train(job_of(source, tmp_path / "run", data=(make(tmp_path),)))


@pytest.mark.usefixtures("no_weights")
def test_tokenizer(source: Path, tmp_path: Path) -> None:
    os.mkdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty: no tokenizer can be made of this"):
        train(job_of(source, tmp_path / "run", tokenizer=str(tmp_path / "empty")))
    small = make_source(tmp_path / "small", fp8=False, vocab_size=100, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"the tokenizer has 259 tokens, the model 100; it is another model's"):
        train(job_of(small, tmp_path / "run"))


LAYOUTS = {
    "tp": ({"tp": 3}, 3, "divi"),
    "gpus": ({"tp": 4}, 6, r"gpus \(6\) must be a positive multiple of tp x cp x pp"),
    "experts": ({"ep": 3}, 3, "ep"),
    "global batch": ({}, 3, r"global_batch_size \(4\) must be a multiple of micro_batch_size x dp = 1 x 3 = 3"),
    "virtual stages": ({"pp": 2, "vpp": 2, "global_batch_size": 3}, 2, r"the 3 microbatches of a step"),
    "sequence": ({"tp": 2, "etp": 1, "seq_length": 33}, 2, r"seq_length \(33\) must be a multiple of 2"),
    "too long": ({"seq_length": 8192}, 1, r"seq_length \(8192\) is above the model's max_position_embeddings \(4096\)"),
    "context": ({"cp": 2, "dtype": "bf16"}, 2, r"cp \(2\) above 1 needs Transformer Engine's attention"),
    "context, float32": ({"cp": 2, "dtype": "fp32"}, 2, r"cp \(2\) above 1 needs dtype bf16, found fp32"),
    "graphs": ({"cuda_graphs": True}, 1, r"cuda_graphs need a GPU"),
    "fusions": ({"fusions": ("router", "permute")}, 1, r"fusions: router, permute need Transformer Engine and a GPU"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(source: Path, tmp_path: Path, name: str) -> None:
    from bridge.memory_plan.plan import read_config

    changes, world, words = LAYOUTS[name]
    with pytest.raises(ValueError, match=words):
        check_layout(job_of(source, tmp_path / "run", **changes), read_config(source), world, "local")


SETTINGS = {
    "unknown": ({"learning_rate": 1}, r"here: unknown setting 'learning_rate'; "),
    "near": ({"step": 1}, r"unknown setting 'step'; did you mean steps\?"),
    "missing": ({"model": "a", "data": "b", "out": "c", "steps": 1}, r"here: seq_length must be given"),
    "type": ({"steps": "ten"}, r"here: steps must be int, found 'ten'"),
    "choice": ({"schedule": "wavy"}, r"schedule must be one of cosine, linear, constant, found 'wavy'"),
    "warm-up": ({"warmup_steps": 10}, r"warmup_steps \(10\) must be below steps \(10\)"),
    "negative": ({"clip_grad": -1.0}, r"clip_grad must be at least 0, found -1\.0"),
    "no such fusion": ({"fusions": ["rope"]}, r"here: fusions must be one of none, router, .*, found 'rope'"),
    "fusions": ({"fusions": ["none", "router"]}, r"fusions: found none beside router"),
    "shares": ({"data_weights": [0.5, 0.5]}, r"data_weights has 2 shares for 1 files"),
    "share": ({"data_weights": [float("nan")]}, r"data_weights must be positive, found \(nan,\)"),
    "infinite": ({"lr": float("inf")}, r"lr must be a finite number, found inf"),
    "beta": ({"beta2": 1.0}, r"beta2 must be below 1, found 1\.0"),
    "epsilon": ({"epsilon": 0.0}, r"epsilon must be above 0, found 0\.0"),
    "seed": ({"seed": -1}, r"seed must be from 0 to 4294967295, found -1"),
    "large seed": ({"seed": 2**32}, r"seed must be from 0 to 4294967295, found 4294967296"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    changes, words = SETTINGS[name]
    whole = {"model": "m", "data": ["d.txt"], "out": "o", "steps": 10, "seq_length": 8}
    values = changes if name == "missing" else whole | changes
    with pytest.raises(ValueError, match=words):
        TrainJob.from_values(values, "here")


def test_yaml_reads_what_a_command_line_says(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: m\ndata: d.txt\nout: o\nsteps: 10\nseq_length: 8\nlr: 1e-3\nexport: fp8\nfreeze: ['*.experts.*']\n"
    )
    job = TrainJob.from_values(read_yaml(tmp_path / "run.yaml"), "run.yaml")
    assert (job.data, job.lr, job.export, job.freeze) == (("d.txt",), 1e-3, "fp8", ("*.experts.*",))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="expected settings, a line `name: value` for each, found list"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    (tmp_path / "twice.yaml").write_text("steps: 2\nlr: 1\nsteps: 7\n")
    with pytest.raises(ValueError, match=r"twice\.yaml: cannot be read as YAML .steps is there twice"):
        read_yaml(tmp_path / "twice.yaml")


def test_a_run_goes_on_only_with_what_it_was_begun_with(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(job_of(source, run, steps=3, until=1))
    other = tmp_path / "other.txt"
    other.write_text(TEXT.read_text().replace("Alice", "Hatter"))
    deeper = make_source(tmp_path / "deeper", fp8=False, num_hidden_layers=4)
    changes = {
        r"with setting lr = 0\.003, and now it is 0\.1": {"lr": 0.1},
        r"with setting seq_length = 32, and now it is 64": {"seq_length": 64},
        r"begun with other data, 7142 tokens .*go on with the same files": {"data": (str(other),)},
        r"with size of the model num_hidden_layers = 2, and now it is 4": {"model": str(deeper)},
    }
    for words, change in changes.items():
        with pytest.raises(ValueError, match=words):
            train(job_of(source, run, steps=3, **change))
    record, here = json.loads((run / "run.json").read_text()), default_backend()
    there = next(name for name in get_args(Backend) if name != here)
    (run / "run.json").write_text(json.dumps(record | {"layers": there}))
    with pytest.raises(ValueError, match=r"begun with .* layers.*, and this host has .* layers.* --model .*run from"):
        train(job_of(source, run, steps=3))
    if here == "local":  # planned for the hosts that it was begun on
        assert dry_run(job_of(source, run, steps=3), gpus=1, memory="80GB").fits
    del record["layers"]  # as of a run of an earlier version
    (run / "run.json").write_text(json.dumps(record))
    assert train(job_of(source, run, steps=3, until=2)).first == 1
    os.mkdir(tmp_path / "full")
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"full: holds thesis\.txt and no run\.json"):
        train(job_of(source, tmp_path / "full"))
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]
    (tmp_path / "full" / "run.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"run\.json: is damaged, or no run's"):
        train(job_of(source, tmp_path / "full"))
    assert (tmp_path / "full" / "run.json").read_text() == '{"mine": 1}'
    (run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json: is damaged"):
        train(job_of(source, run, steps=3))


def test_what_failed_before_the_first_checkpoint_binds_nobody(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings, model and data may be others."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.tmp").write_text("{")
    wide = make_source(tmp_path / "wide", fp8=False, num_hidden_layers=2, head_dim=32)
    with monkeypatch.context() as patched:
        patched.setattr(training, "build", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(job_of(wide, tmp_path / "run"))
    files = (str(TEXT), lines(tmp_path / "b.jsonl", {"tokens": [5] * 99}))
    summary = train(job_of(source, tmp_path / "run", steps=1, warmup_steps=0, data=files, data_weights=(0.5, 0.5)))
    assert summary.last == 1
    laid = tmp_path / "run" / "checkpoints" / "hugging_face" / "config.json"
    assert laid.read_bytes() == (source / "config.json").read_bytes()


def test_a_folder_in_which_another_run_is(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "SECONDS", 0.2)
    with alone.alone_in(tmp_path / "run"), pytest.raises(ValueError, match="run: another process is at work in it"):
        train(job_of(source, tmp_path / "run"))
    assert train(job_of(source, tmp_path / "run", steps=1, warmup_steps=0)).last == 1
    (tmp_path / "file").write_text("a")
    with pytest.raises(ValueError, match="file: found a file, expected a folder or nothing"):
        train(job_of(source, tmp_path / "file"))


FROZEN = {
    "nothing": (
        "*.expert.*",
        "local",
        r"freeze: no parameter fits '\*\.expert\.\*'; names are such as embedding",
    ),
    "what is not trained": ("*.expert_bias", "local", r"freeze: no parameter fits '\*\.expert_bias'"),
    "all": ("*", "local", r"freeze: \['\*'\] leaves a rank nothing to train"),
    "a stage": ("*.layers.*", "local", r"leaves a rank nothing to train"),
    "some experts": (
        "*.weight1",
        "transformer_engine",
        r"some experts of decoder\.layers\.0\.mlp\.experts\.linear_fc1",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen(source: Path, tmp_path: Path, name: str) -> None:
    """Of three stages, of which one has layers alone."""
    from bridge.memory_plan.plan import read_config

    pattern, backend, words = FROZEN[name]
    config = replace(read_config(source), num_hidden_layers=3)
    job = job_of(source, tmp_path / "run", freeze=(pattern,), pp=3)
    with pytest.raises(ValueError, match=words):
        check_layout(job, config, 3, backend)
    check_layout(job.at(freeze=("*.experts.*",)), config, 3, backend)


@pytest.mark.usefixtures("no_weights")
def test_frozen_names_are_looked_at_before_there_is_a_model(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="freeze: no parameter fits 'nope'"):
        train(job_of(source, tmp_path / "run", freeze=("nope",)))
    assert not (tmp_path / "run").exists()


def test_a_config_under_another_name(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny.json"
    other.write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"tiny\.json: is not called config\.json"):
        train(job_of(other, tmp_path / "run"))


IN_PLACE = " yet; look at the data and weights, or give the same command a lower learning rate$"
ELSEWHERE = (
    r", .* a lower learning rate needs another run, with another --out, from what this one started from or an older"
)


def test_a_loss_that_is_not_finite_names_the_layer(source: Path, tmp_path: Path) -> None:
    """A weight of the second layer goes to infinity after a checkpoint: the run ends, and the checkpoint stays."""
    name = "model.layers.1.self_attn.o_proj.weight"
    broken = make_source(tmp_path / "broken", fp8=False, num_hidden_layers=2)
    edit_tensors(broken, lambda tensors: tensors[name].fill_(torch.inf))
    with pytest.raises(
        NotFiniteError, match=r"step 1: the loss is not finite; it began in layer 1; .*no checkpoint" + IN_PLACE
    ):
        train(job_of(broken, tmp_path / "run"))
    run = tmp_path / "later"
    train(job_of(source, run, steps=3, until=1, warmup_steps=0))
    real = training.load_checkpoint

    def load_and_break(trained, *arguments):
        real(trained, *arguments)
        with torch.no_grad():
            trained.chunks[0].decoder.layers[0].mlp.router.weight.fill_(torch.nan)

    with (
        patch.object(training, "load_checkpoint", load_and_break),
        pytest.raises(
            NotFiniteError, match=r"step 2: .*began in layer 0; .*and the checkpoint of step 1 is kept" + ELSEWHERE
        ),
    ):
        train(job_of(source, run, steps=3, warmup_steps=0))
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "1"
