"""A loss or a gradient that is not finite: where it began, on every layout, and nothing of that step is kept."""

import itertools
from pathlib import Path

import pytest
import torch
from support.checks import NO_GPU
from support.ranks import RankPool
from support.training_faults import infinite_gradient, planted, run_with_planted, state_of
from support.training_runs import SECONDS, job_of, values_of

from bridge.model.process_groups import model_parallel
from bridge.training.data.batches import build_dataset
from bridge.training.data.indexed import make_sources
from bridge.training.data.tokenizer import Tokenizer
from bridge.training.loop import NotFiniteError, _batches
from bridge.training.start import open_start
from bridge.training.step import NotFinite, StepResult, Trained, train_step
from bridge.training.train import build, train

LAYOUTS = {"tp2 ep2": {"tp": 2, "ep": 2, "etp": 1}, "pp2": {"pp": 2}, "dp2": {}}
# What is planted in layer 1, and what the error says of it.
SAID = {
    "gradient": "step 1: the gradient is not finite; it began in layer 1, of model.layers.1.input_layernorm.weight, "
    "model.layers.1.self_attn.k_norm.weight, model.layers.1.self_attn.k_proj.weight and 4 more, and went on to 22 "
    "weights before; this step was not made, and there is no checkpoint yet",
    "weight": "step 1: the loss is not finite; it began in layer 1; not finite are the weights "
    "model.layers.1.self_attn.o_proj.weight; this step was not made, and there is no checkpoint yet",
}
PLACES = [("tp2 ep2", "gradient"), ("pp2", "gradient"), ("tp2 ep2", "weight"), ("pp2", "weight"), ("dp2", "gradient")]


@pytest.mark.parametrize(("layout", "what"), PLACES)
def test_every_rank_says_where_it_began_and_has_made_no_step(
    source: Path, pair: RankPool, tmp_path: Path, layout: str, what: str
) -> None:
    values = values_of(job_of(source, tmp_path / "run", warmup_steps=0, **LAYOUTS[layout]))
    for kind, words, changed in pair.call(run_with_planted, values, what, 1, seconds=SECONDS):
        assert kind == "NotFiniteError"
        assert words.startswith(SAID[what])
        assert changed == []


def test_squares_that_overflow_name_the_largest_gradient(source: Path, tmp_path: Path) -> None:
    job = job_of(source, tmp_path / "run", warmup_steps=0)
    with (
        planted(lambda trained: infinite_gradient(trained, 1, 1e24)),
        pytest.raises(
            NotFiniteError, match=r"it began in the sum of its squares: the largest entry is \d.*e\+\d+, of model\."
        ),
    ):
        train(job)


@pytest.mark.gpu
@NO_GPU
def test_a_loss_under_cuda_graphs_names_its_layer(source: Path, tmp_path: Path) -> None:
    """Which a replay does not go through; the weight is bad from the fifth step on."""
    job = job_of(source, tmp_path / "run", warmup_steps=0, dtype="bf16", cuda_graphs=True)
    microbatches = 4 * job.global_batch_size

    def planted_later(trained: Trained) -> None:
        (chunk,), seen = trained.chunks, itertools.count()

        def look(*_: object) -> None:
            if next(seen) == microbatches:
                with torch.no_grad():
                    chunk.decoder.layers[1].self_attention.linear_proj.weight.fill_(torch.inf)

        chunk.embedding.register_forward_pre_hook(look)

    with (
        planted(planted_later),
        pytest.raises(NotFiniteError, match=r"^step 5: the loss is not finite; it began in layer 1; not finite are"),
    ):
        train(job)


@pytest.mark.gpu
@NO_GPU
def test_experts_that_are_trained_together_are_frozen_together(source: Path, tmp_path: Path) -> None:
    job = job_of(source, tmp_path / "run", freeze=("*.layers.0.*.linear_fc1.weight2",))
    with pytest.raises(ValueError, match=r"leaves some experts of .*linear_fc1 trained and others not, .*; freeze '"):
        train(job)


def test_after_a_step_that_was_not_made_the_run_could_go_on_from_memory(source: Path, tmp_path: Path) -> None:
    """A step whose gradient is infinite, then the same step again: every bit is that of the step alone."""
    job = job_of(source, tmp_path / "run", warmup_steps=0)
    ends, losses = [], []
    for is_planted in (False, True):
        with open_start(job) as start, model_parallel():
            sources = make_sources(job.data, Tokenizer(job.model, 260), 260, tmp_path / "data")
            dataset = build_dataset(job, sources, tmp_path / "data" / "indices")
            trained = build(job, start)
            if is_planted:
                before = state_of(trained)
                hook = infinite_gradient(trained, 1)
                assert train_step(trained, _batches(trained, dataset, 1)) == NotFinite("gradient")
                hook.remove()
                assert [name for name, value in state_of(trained).items() if not torch.equal(value, before[name])] == []
            for step in (1, 2):
                result = train_step(trained, _batches(trained, dataset, step))
                assert isinstance(result, StepResult)
                losses.append(result.loss)
            ends.append(state_of(trained))
    alone, after = ends
    assert losses[:2] == losses[2:]
    assert [name for name, value in alone.items() if not torch.equal(value, after[name])] == []
