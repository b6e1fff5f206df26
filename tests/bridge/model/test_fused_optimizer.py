"""megatron-core's distributed optimizer with a step that is one kernel, against its own step on the same gradients."""

from typing import Any

import pytest
import torch
from support.checks import NO_GPU
from support.optimizer_steps import BETAS, made_of, put_gradients, wrapped_model
from torch import Tensor

from bridge.model.fused_optimizer import FusedOptimizer
from bridge.model.process_groups import model_parallel

STEPS = 4
EPS = torch.finfo(torch.float32).eps
# Of the largest element, for others are sums that cancel. Transformer Engine has beta in float32, and so 1 - beta off
# by up to EPS / 2.
BOUNDS = {
    "exp_avg": 4 * EPS + EPS / (1 - BETAS["adam_beta1"]),
    "exp_avg_sq": 4 * EPS + EPS / (1 - BETAS["adam_beta2"]),
    "weight": 8 * EPS,
    "model": 8 * EPS,
}


def state_of(wrapped: Any, optimizer: Any) -> dict[str, Tensor]:
    """Weights of the model and of the optimizer, Adam's averages, and what its groups count; cloned."""
    found = {f"model {name}": value for name, value in wrapped.named_parameters()}
    for number, part in enumerate(optimizer.chained_optimizers):
        for index, group in enumerate(part.param_groups):
            where = f"{number} {index}"
            found[f"step {where}"] = torch.tensor(group.get("step", 0))
            for place, weight in enumerate(group["params"]):
                found[f"weight {where} {place}"] = weight
                found |= {f"{key} {where} {place}": one for key, one in part.optimizer.state[weight].items()}
    return {name: one.detach().clone() for name, one in found.items()}


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_megatron_core_s(dtype: torch.dtype, clip_grad: float) -> None:
    """Norms to the bit, float32 weights and averages to a few roundings, the model's weights are these rounded."""
    with model_parallel():
        found = []
        for fused in (False, True):
            wrapped = wrapped_model(dtype)
            optimizer = made_of(wrapped, dtype, clip_grad=clip_grad)
            optimizer = FusedOptimizer(optimizer) if fused else optimizer
            norms = []
            for step in range(1, STEPS + 1):
                put_gradients(wrapped, step)
                moved, norm, _ = optimizer.step()
                assert moved
                norms.append(float(norm))
                optimizer.zero_grad()
            found.append((norms, state_of(wrapped, optimizer)))
            halves = [
                (weight, half)
                for part in optimizer.chained_optimizers
                for groups in zip(part.shard_fp32_from_float16_groups, part.shard_float16_groups, strict=True)
                for weight, half in zip(*groups, strict=True)
            ]
            assert bool(halves) == (dtype == torch.bfloat16)
            assert all(torch.equal(weight.bfloat16(), half) for weight, half in halves)
        (norms, theirs), (norms_of_ours, ours) = found
        assert norms == norms_of_ours
        assert norms[0] > 1 > norms[1]
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            kind, off = name.split()[0], (ours[name].float() - value.float()).abs()
            if kind == "step":
                assert ours[name] == value == STEPS
            elif value.dtype == torch.bfloat16:  # neighbours, where a float32 weight was near the middle of two
                last = torch.finfo(torch.bfloat16).eps * value.float().abs()
                assert (off <= last + BOUNDS["weight"] * value.float().abs().max()).all(), name
            else:
                assert off.max() <= BOUNDS[kind] * value.abs().max(), name


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize(("spoilt", "loss"), [(torch.inf, 1.0), (torch.nan, 1.0), (1e30, 1.0), (None, torch.nan)])
def test_a_step_that_is_not_finite_is_not_made(spoilt: float | None, loss: float) -> None:
    """And leaves everything as it was, gradients too; the next one is made as if it had not been."""
    with model_parallel():
        wrapped = wrapped_model(torch.bfloat16)
        optimizer = FusedOptimizer(made_of(wrapped, torch.bfloat16))
        for made in (0, 1):
            before = state_of(wrapped, optimizer)
            put_gradients(wrapped, 3, spoilt)
            gradients = [parameter.main_grad.clone() for parameter in wrapped.parameters()]
            moved, norm, _ = optimizer.step(torch.tensor(loss, dtype=torch.float64, device="cuda"))
            assert not moved
            assert torch.tensor(norm).isfinite() == (spoilt is None)
            after = state_of(wrapped, optimizer)
            assert after.keys() == before.keys()
            assert any("exp_avg" in name for name in after) == bool(made)
            assert all(torch.equal(before[name], value) for name, value in after.items())
            for one, parameter in zip(gradients, wrapped.parameters(), strict=True):
                torch.testing.assert_close(parameter.main_grad, one, rtol=0, atol=0, equal_nan=True)
            put_gradients(wrapped, 2)
            assert optimizer.step()[0]
        assert {int(value) for name, value in state_of(wrapped, optimizer).items() if name.startswith("step")} == {2}


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_sent_to_the_processor_and_back_is_the_model_s_again(dtype: torch.dtype) -> None:
    """Float32 weights have other memory then than the model's."""
    with model_parallel():
        ends = []
        for offloaded in (False, True):
            wrapped = wrapped_model(dtype)
            optimizer = FusedOptimizer(made_of(wrapped, dtype))
            for step in (1, 2):
                put_gradients(wrapped, step)
                assert optimizer.step()[0]
                optimizer.zero_grad()
                if offloaded:
                    optimizer.offload_to_cpu()
                    optimizer.restore_from_cpu()
            ends.append(state_of(wrapped, optimizer))
        plain, after = ends
        assert all(torch.equal(value, after[name]) for name, value in plain.items())


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not distributed": ({}, {"use_distributed_optimizer": False}, "distributed optimizer; set use_distributed_opt"),
    "L2 penalty": ({"decoupled_weight_decay": False}, {}, "with decoupled weight decay; set"),
    "narrow state": (
        {"use_precision_aware_optimizer": True},
        {},
        "and use_precision_aware_optimizer=False",
    ),
    "zeros counted": ({"log_num_zeros_in_grad": True}, {}, "log_num_zeros_in_grad=False"),
    "skipped": ({"grad_norm_skip_threshold": 1.0}, {}, "leave grad_norm_skip_threshold"),
    "captured": ({"optimizer_cuda_graph": True}, {}, "optimizer_cuda_graph=False"),
}


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernel_does_not_compute_is_refused(name: str) -> None:
    settings, ddp, message = OTHERS[name]
    with model_parallel():
        made = made_of(wrapped_model(torch.bfloat16, **ddp), torch.bfloat16, **settings)
        with pytest.raises(ValueError, match=message):
            FusedOptimizer(made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the optimizer is Transformer Engine's")
def test_another_adam_is_refused() -> None:
    """Without a GPU it is torch's."""
    with model_parallel():
        made = made_of(wrapped_model(torch.bfloat16), torch.bfloat16)
        with pytest.raises(ValueError, match=r"DistributedOptimizer of AdamW, .* needs Transformer Engine, on a GPU"):
            FusedOptimizer(made)
        with pytest.raises(ValueError, match=r"found DistributedOptimizer, expected a ChainedOptimizer, .* set that"):
            FusedOptimizer(made.chained_optimizers[0])
