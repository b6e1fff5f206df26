"""On a GPU: what is fused computes what the separate operations do, and it is what runs.

`gradient_accumulation`: what a weight's gradients sum up to over microbatches, against the run in which another kernel
adds them; in float32 to its rounding, in bfloat16 to what rounding each microbatch's gradient may cost. With it and on
one rank the processor waits for the GPU nowhere in a forward and backward pass. `grouped_gemm`: Transformer Engine's
grouped linear layer against float64, with experts that have no token.
"""

from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from support.checks import NO_GPU
from support.small_model import SMALL
from torch import Tensor

from bridge import model_parallel
from bridge.model.build import build_model
from bridge.model.fusions import FUSIONS, fusion_settings
from bridge.model.gradient_accumulation import PRODUCTS
from bridge.training.optimizer import freeze, wrap
from reference.model_class import ModelClass

pytestmark = [pytest.mark.gpu, NO_GPU]
EXPERTS_KERNEL = "_add"  # of compiled.experts
WAITS = {"cudaEventSynchronize", "cudaStreamSynchronize"}
FUSED_WEIGHTS = (
    "linear_qkv.weight",
    "linear_proj.weight",
    "linear_fc1.weight",
    "linear_fc2.weight",
    "output_layer.weight",
    "word_embeddings.weight",
)


class Summed(NamedTuple):
    """Gradients by name, the weights whose gradients the layers added themselves, and the kernels that ran."""

    gradients: dict[str, Tensor]
    added: set[str]
    kernels: set[str]


def random_model(model_class: ModelClass, generator: torch.Generator, **settings: Any) -> Any:
    """Matrices are drawn."""
    destroy_moe_metrics_tracker()  # it has as many layers as the last model of this process
    model = build_model(SMALL, model=model_class, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, device="cuda", generator=generator) / 8)
    return model


def summed_gradients(dtype: torch.dtype, model_class: ModelClass, frozen: list[str], *, fused: bool) -> Summed:
    """Of two microbatches, of what is not `frozen`."""
    generator = torch.Generator("cuda").manual_seed(5)
    with model_parallel():
        model = random_model(model_class, generator, params_dtype=dtype, gradient_accumulation_fusion=fused)
        assert model.config.gradient_accumulation_fusion is fused
        freeze([model], tuple(frozen))
        (wrapped,) = wrap([model])
        wrapped.zero_grad_buffer()
        positions = torch.arange(32, device="cuda").expand(2, -1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(2):
                tokens = torch.randint(0, SMALL.vocab_size, (2, 33), device="cuda", generator=generator)
                wrapped(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()
            torch.cuda.synchronize()
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert all(parameter.grad is None for _, parameter in named)
        added = {name for name, parameter in named if parameter.grad_added_to_main_grad}
        gradients = {name: parameter.main_grad.clone() for name, parameter in named}
        return Summed(gradients, added, {event.name for event in profile.events()})


@pytest.mark.parametrize("frozen", [[], ["*embedding*", "*self_attention*", "*norm*", "*router*"]])
@pytest.mark.parametrize("model_class", list(ModelClass))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_layers_add_their_gradients_themselves(
    dtype: torch.dtype, bound: float, model_class: ModelClass, frozen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    plain = summed_gradients(dtype, model_class, frozen, fused=False)
    fused = summed_gradients(dtype, model_class, frozen, fused=True)
    assert plain.added == set()
    assert fused.added == {name for name in plain.gradients if any(part in name for part in FUSED_WEIGHTS)}
    assert EXPERTS_KERNEL not in plain.kernels
    assert (EXPERTS_KERNEL in fused.kernels) == (dtype == torch.bfloat16)
    for name, gradient in plain.gradients.items():
        assert fused.gradients[name].dtype == torch.float32
        distance = (fused.gradients[name] - gradient).norm() / gradient.norm()
        assert distance <= bound, f"{name}: {distance:.2e}"


@pytest.mark.parametrize("sums", [torch.float32, torch.bfloat16])
def test_the_output_layer_adds_its_gradient_as_float64_would(sums: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(9)
    x, grad = (torch.randn(300, width, device="cuda", generator=generator).bfloat16() for width in (96, 200))
    total = torch.randn(200, 96, device="cuda", generator=generator).to(sums)
    exact = total.double() + grad.double().T @ x.double()
    PRODUCTS.wgrad_gemm_accum_fp32(x, grad, total)
    assert (total - exact).norm() <= torch.finfo(sums).eps * 8 * exact.norm()


LOSSES: dict[str, dict[str, Any]] = {
    "aux_loss": {},
    "seq_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "two at once": {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.2]},
    "z-loss": {"moe_z_loss_coeff": 0.1},
}


def gradients_of(model_class: ModelClass, **settings: Any) -> dict[str, Tensor]:
    """Of a bfloat16 model with a loss for balance that counts, float32 sums of one microbatch."""
    generator = torch.Generator("cuda").manual_seed(7)
    with model_parallel():
        model = random_model(model_class, generator, **{"moe_aux_loss_coeff": 0.1} | settings)
        (wrapped,) = wrap([model])
        wrapped.zero_grad_buffer()
        tokens = torch.randint(0, SMALL.vocab_size, (4, 129), device="cuda", generator=generator)
        positions = torch.arange(128, device="cuda").expand(4, -1)
        wrapped(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()
        return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_class", list(ModelClass))
@pytest.mark.parametrize("name", LOSSES)
def test_a_model_has_fusions_with_the_gradients_of_none(name: str, model_class: ModelClass) -> None:
    """With any loss of the router, which counts: off by a rounding to bfloat16."""
    fused = gradients_of(model_class, **LOSSES[name])
    plain = gradients_of(model_class, **LOSSES[name], **fusion_settings(("none",)))
    for key, gradient in plain.items():
        distance = (fused[key] - gradient).norm() / gradient.norm()
        print(f"{key}: {distance:.1e}")
        assert distance < 2**-8, key
    assert any(not torch.equal(fused[key], gradient) for key, gradient in plain.items())
    without = gradients_of(model_class, moe_aux_loss_coeff=0.0)
    routers = [key for key in plain if key.endswith("router.weight")]
    assert all((without[key] - plain[key]).norm() > 2**-4 * plain[key].norm() for key in routers)


def waits_of_a_step(model_class: ModelClass, **settings: bool) -> set[str]:
    """Of a forward and backward pass, after another one."""
    with model_parallel():
        model = random_model(model_class, torch.Generator("cuda").manual_seed(8), **settings)
        (wrapped,) = wrap([model])
        tokens = torch.randint(0, SMALL.vocab_size, (2, 33), device="cuda")
        positions = torch.arange(32, device="cuda").expand(2, -1)

        def step() -> None:
            wrapped(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()

        step()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step()
        torch.cuda.synchronize()
        return WAITS & {event.name for event in profile.events()}


@pytest.mark.parametrize("model_class", list(ModelClass))
def test_the_processor_does_not_wait_for_the_tokens_of_one_rank(model_class: ModelClass) -> None:
    assert waits_of_a_step(model_class)
    assert waits_of_a_step(model_class, gradient_accumulation_fusion=True) == set()


def grouped(splits: list[int], weights: list[Tensor], x: Tensor, grad: Tensor) -> tuple[list[Tensor], set[str]]:
    """Output, gradient of x, gradients of the weights; and the names of the kernels."""
    from transformer_engine.pytorch import GroupedLinear

    out_features, in_features = weights[0].shape
    layer = GroupedLinear(len(splits), in_features, out_features, bias=False, params_dtype=x.dtype, device="cuda")
    with torch.no_grad():
        for number, weight in enumerate(weights):
            getattr(layer, f"weight{number}").copy_(weight)
    leaf = x.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        output = layer(leaf, splits)
        output.backward(grad)
        torch.cuda.synchronize()
    found = [output, leaf.grad, *(getattr(layer, f"weight{number}").grad for number in range(len(splits)))]
    return found, {event.name for event in profile.events()}


@pytest.mark.parametrize("splits", [[64, 0, 7, 129], [0, 0, 0, 200], [50, 50, 50, 50]])
def test_experts_products_in_one_kernel(splits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(6)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    weights, x, grad = [drawn(256, 384) for _ in splits], drawn(200, 384), drawn(200, 256)
    rows = list(zip(x.double().split(splits), grad.double().split(splits), weights, strict=True))
    truth = [torch.cat([a @ w.double().T for a, _, w in rows]), torch.cat([g @ w.double() for _, g, w in rows])]
    truth += [g.T @ a for a, g, _ in rows]
    plain, names = grouped(splits, weights, x, grad)
    assert not any("cutlass" in name for name in names)
    for name, value in FUSIONS["grouped_gemm"].environment.items():
        monkeypatch.setenv(name, value)
    fused, names = grouped(splits, weights, x, grad)
    assert any("cutlass" in name for name in names)
    unit = torch.finfo(torch.bfloat16).eps / 2
    for found in (plain, fused):
        for one, exact in zip(found, truth, strict=True):
            assert (one.double() - exact).norm() <= 1.01 * unit * exact.norm()
