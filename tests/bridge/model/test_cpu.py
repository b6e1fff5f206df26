"""megatron-core without a GPU: what is replaced comes back, and a training step there is the plain gradient."""

from functools import partial
from inspect import getattr_static
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from bridge.model.build import build_gpt_model
from bridge.model.cpu import _REPLACEMENTS, megatron_on_cpu
from bridge.model.process_groups import model_parallel
from reference.config import ModelConfig

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="megatron_on_cpu() refuses to start beside a GPU")

SMALL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=32,
    vocab_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    intermediate_size=24,
    num_local_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.2,
)


def _attributes():
    return [getattr_static(owner, name) for owner, name, _ in _REPLACEMENTS]


@cpu_only
def test_everything_replaced_comes_back():
    before = _attributes()
    with megatron_on_cpu():
        inside = _attributes()
        with megatron_on_cpu():
            assert torch.cuda.current_device() == torch.device("cpu")
        assert all(now is then for now, then in zip(_attributes(), inside, strict=True))
    assert all(now is then for now, then in zip(_attributes(), before, strict=True))
    assert not any(now is then for now, then in zip(inside, before, strict=True))


@cpu_only
def test_everything_replaced_comes_back_after_an_exception():
    before = _attributes()
    with pytest.raises(KeyError), megatron_on_cpu():
        raise KeyError
    assert all(now is then for now, then in zip(_attributes(), before, strict=True))


def test_refused_beside_a_gpu():
    before = _attributes()
    with (
        patch.object(torch.cuda, "is_available", return_value=True),
        pytest.raises(RuntimeError, match="hosts without a GPU"),
        megatron_on_cpu(),
    ):
        pass
    assert all(now is then for now, then in zip(_attributes(), before, strict=True))


@cpu_only
def test_torch_compile_inside_and_after():
    """torch.compile indexes torch's functions when it is first used, and again after `init_process_group`."""
    x = torch.randn(8)
    with model_parallel():
        inside = torch.compile(lambda x: torch.zeros(8) + torch.ones(8) * x.sin(), backend="eager", fullgraph=True)(x)
    after = torch.compile(lambda x: torch.ones(8) * x.sin() + torch.zeros(8), backend="eager", fullgraph=True)(x)
    assert torch.equal(inside, x.sin())
    assert torch.equal(after, x.sin())


def test_model_parallel_sets_up_and_takes_down():
    with model_parallel():
        assert torch.distributed.get_world_size() == 1
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert get_cuda_rng_tracker().is_initialized()
    assert not torch.distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert not get_cuda_rng_tracker().is_initialized()


def test_random_states_that_were_made_anew_inside_are_taken_down():
    with model_parallel():
        model_parallel_cuda_manual_seed(5, te_rng_tracker=False, force_reset_rng=True)
    assert not get_cuda_rng_tracker().is_initialized()


def test_model_parallel_leaves_what_was_there():
    with model_parallel():
        group = parallel_state.get_tensor_model_parallel_group()
        with model_parallel():
            assert parallel_state.get_tensor_model_parallel_group() is group
        assert parallel_state.get_tensor_model_parallel_group() is group
        with pytest.raises(ValueError, match="exist already"), model_parallel(tensor_model_parallel_size=1):
            pass
        assert parallel_state.get_tensor_model_parallel_group() is group


def _batches(count):
    tokens = torch.randint(0, SMALL.vocab_size, (count, 2, 13), generator=torch.Generator().manual_seed(5))
    return [{"tokens": row[:, :-1], "labels": row[:, 1:]} for row in tokens.to(_device())]


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _loss(model, batch):
    positions = torch.arange(batch["tokens"].shape[1], device=_device()).expand_as(batch["tokens"])
    return model(batch["tokens"], positions, None, labels=batch["labels"])


def _forward_step(batches, model):
    return _loss(model, next(batches)), lambda losses: (losses.mean(), {})


def _model(**overrides):
    return build_gpt_model(SMALL, params_dtype=torch.float32, **overrides)


def _gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_training_step_is_the_plain_gradient():
    """DistributedDataParallel, the schedule and finalize_model_grads, in one process, with the auxiliary loss on."""
    batches = _batches(2)
    with model_parallel():
        trained = _model(finalize_model_grads_func=partial(finalize_model_grads, force_all_reduce=True))
        plain = _model()
        plain.load_state_dict(trained.state_dict())  # now: the step moves the router's bias
        ddp = DistributedDataParallel(trained.config, DistributedDataParallelConfig(), trained)
        forward_backward_no_pipelining(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=ddp,
            num_microbatches=len(batches),
            seq_length=12,
            micro_batch_size=2,
        )
        for batch in batches:
            (_loss(plain, batch).mean() / len(batches)).backward()
        for name, parameter in trained.named_parameters():
            torch.testing.assert_close(parameter.main_grad, plain.get_parameter(name).grad, msg=name)


def test_recomputation_gives_the_same_gradients():
    (batch,) = _batches(1)
    with model_parallel():
        plain = _model()
        recomputing = _model(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
        recomputing.load_state_dict(plain.state_dict())
        for model in (plain, recomputing):
            _loss(model, batch).mean().backward()
        for name, gradient in _gradients(recomputing).items():
            assert torch.equal(gradient, plain.get_parameter(name).grad), name
