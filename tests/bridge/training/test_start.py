"""What a run can start from: the same weights from either format and from a run, into either class; random ones."""

import math
from pathlib import Path

import pytest
import torch
from support.training_runs import CONFIG, job_of, make_source, run_job, training_ranks, values_of

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.training.metrics import read_metrics
from bridge.training.train import train

SETTINGS = {"steps": 2, "warmup_steps": 0, "dtype": "bf16"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "hf", num_hidden_layers=2)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def test_a_megatron_checkpoint_of_either_class_and_a_run_start_as_their_source_does(
    source: Path, tmp_path: Path
) -> None:
    """Every bit: an imported checkpoint and a run's last one hold what the Hugging Face folders hold."""
    import_checkpoint(ImportJob(str(source), str(tmp_path / "imported")))
    first = job_of(source, tmp_path / "first", export="bf16", **SETTINGS)
    train(first)
    for model_class in ("gpt", "hybrid"):
        out = tmp_path / model_class
        train(first.at(model=str(tmp_path / "imported"), out=str(out), model_class=model_class, export="fp8"))
        assert losses(out) == losses(tmp_path / "first")
        assert (out / "export" / "config.json").is_file()
    for start in ("first", "first/export"):
        out = tmp_path / start.replace("/", "-from-")
        train(first.at(model=str(tmp_path / start), out=f"{out} again", export=None))
    again, exported = (losses(Path(f"{tmp_path / name} again")) for name in ("first", "first-from-export"))
    assert again == exported
    assert again[0] < losses(tmp_path / "first")[0]


def test_random_weights_are_the_same_at_any_layout(source: Path, tmp_path: Path) -> None:
    job = job_of(source, tmp_path / "one", model=str(source / "config.json"), **SETTINGS | {"dtype": "fp32"})
    train(job.at(tokenizer=str(source)))
    with training_ranks(2) as pool:
        for name, sizes in (("tp2", {"tp": 2, "ep": 2, "etp": 1}), ("pp2", {"pp": 2})):
            other = job.at(model=str(source), random=True, out=str(tmp_path / name), **sizes)
            pool.call(run_job, values_of(other))
            assert losses(tmp_path / name) == pytest.approx(
                losses(tmp_path / "one"), rel=16 * torch.finfo(torch.float32).eps
            )
    train(job.at(seed=7, out=str(tmp_path / "other seed"), until=1))
    assert losses(tmp_path / "other seed")[0] != losses(tmp_path / "one")[0]
    # Nothing is known yet: each of the tokens is as likely, but for logits of unit size.
    assert losses(tmp_path / "one")[0] == pytest.approx(math.log(CONFIG["vocab_size"]) + 0.5, abs=0.3)


def test_what_is_no_start_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        train(job_of(tmp_path / "nowhere", tmp_path / "run"))
    with pytest.raises(ValueError, match=r"config\.json: no such file; random weights need a config\.json"):
        train(job_of(tmp_path / "config.json", tmp_path / "run"))
    with pytest.raises(ValueError, match="run: lies inside"):
        train(job_of(source, source / "run"))
