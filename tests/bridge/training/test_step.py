"""What a step makes of a batch, of which not every token may be trained on."""

import gc
from functools import partial
from pathlib import Path
from weakref import ref

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from support.checks import assert_relative
from support.ranks import RankPool
from support.training_runs import SECONDS, gathers_of_a_run, job_of, make_source, values_of
from torch import Tensor

from bridge.model.process_groups import model_parallel
from bridge.training.optimizer import ddp_config
from bridge.training.start import open_start
from bridge.training.step import AUX_LOSS, StepResult, forward, train_step
from bridge.training.train import build, train


def batches_of(share: int) -> list[dict[str, Tensor]]:
    """Two microbatches, in which one of `share` tokens is trained on."""
    tokens = torch.randint(3, 259, (2, 2, 33), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(32) % share == 0).float().expand(2, -1)
    return [{"tokens": one[:, :-1], "labels": one[:, 1:], "loss_mask": mask} for one in tokens]


@pytest.mark.parametrize("share", [2, 8])
def test_the_load_balancing_loss_weighs_the_same_however_few_tokens_are_trained_on(tmp_path: Path, share: int) -> None:
    """Its gradient is the difference between those with it and without."""
    source = make_source(tmp_path / "source", fp8=False, num_hidden_layers=2)
    job = job_of(source, tmp_path / "run", micro_batch_size=2, bias_update_rate=0.0)
    with open_start(job) as start, model_parallel():
        trained = build(job, start)
        router = trained.chunks[0].decoder.layers[0].mlp.router

        def gradient(coefficient: float, share: int) -> Tensor:
            trained.chunks[0].config.moe_aux_loss_coeff = coefficient
            trained.wrapped[0].zero_grad_buffer()
            forward(trained, [iter(batches_of(share))])
            return router.weight.main_grad.clone()

        of_all, of_few = (gradient(1.0, one) - gradient(0.0, one) for one in (1, share))
        assert of_all.norm() > 0.01
        assert_relative(of_few, of_all, 1e-4, "router")


def test_each_step_reports_its_own_load_balancing_loss(source: Path, tmp_path: Path) -> None:
    """And leaves the tensor where it is, which a CUDA graph adds to; at a learning rate of 0 all steps are the same."""
    job = job_of(source, tmp_path / "run", micro_batch_size=2, lr=0.0, min_lr=0.0, bias_update_rate=0.0)
    reported, tensors = [], []
    with open_start(job) as start, model_parallel():
        trained = build(job, start)
        for _ in range(3):
            result = train_step(trained, [iter(batches_of(1))])
            assert isinstance(result, StepResult)
            reported.append(result.aux_loss)
            tensors.append(get_moe_metrics_tracker().metrics[AUX_LOSS].values)
    assert reported[0] == pytest.approx(1, abs=0.5)  # 1 of experts in balance
    assert reported == pytest.approx(3 * reported[:1], rel=1e-6)
    assert tensors[0] is tensors[1] is tensors[2]


def test_models_of_different_depths_are_trained_one_after_the_other(tmp_path: Path) -> None:
    """megatron-core keeps the load-balancing losses of the last model's layers for the whole process."""
    for layers in (2, 3):
        source = make_source(tmp_path / f"source{layers}", fp8=False, num_hidden_layers=layers)
        job = job_of(source, tmp_path / "run", micro_batch_size=2, aux_loss=0.01)
        with open_start(job) as start, model_parallel():
            forward(build(job, start), [iter(batches_of(1))])


def test_a_run_leaves_no_losses_to_models_of_other_depths(source: Path, tmp_path: Path) -> None:
    train(job_of(source, tmp_path / "run", steps=1, warmup_steps=0))
    assert get_moe_metrics_tracker().metrics == {}


@pytest.mark.parametrize("overlap", [False, True])
def test_what_was_trained_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    """With its process groups, whose threads take time for as long as they are there; with overlap as on a GPU."""
    made = partial(ddp_config, overlap=overlap)
    monkeypatch.setattr("bridge.training.optimizer.ddp_config", lambda config, **_: made(config))
    source = make_source(tmp_path / "source", fp8=False, num_hidden_layers=2)
    job = job_of(source, tmp_path / "run", micro_batch_size=2)
    with open_start(job) as start, model_parallel():
        trained = build(job, start)
        forward(trained, [iter(batches_of(1))])
        model = ref(trained.chunks[0])
    del trained
    gc.collect()
    assert model() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs they are gathered in the forward pass")
def test_weights_are_gathered_once_a_step(source: Path, pair: RankPool, tmp_path: Path) -> None:
    """megatron-core gathers all of them after each of its optimizers, that of the experts and that of the others."""
    values = values_of(job_of(source, tmp_path / "run", steps=3, ep=2, dtype="bf16"))
    for groups in pair.call(gathers_of_a_run, values, seconds=SECONDS):
        assert groups == [3] * len(groups)
        assert len(groups) > 1
