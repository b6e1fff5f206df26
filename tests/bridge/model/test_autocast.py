"""Under torch.autocast, which makes products of two tensors bfloat16: what is kept in float32 stays so, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.oracles import BFLOAT16, FLOAT32
from support.small_model import DEVICE, SMALL, TOKENS
from torch import Tensor

from bridge.model.build import build_model
from bridge.model.process_groups import model_parallel
from bridge.model.router import Float32Logits
from bridge.proof.judge.training import TRAINING_SETTINGS
from reference.model_class import ModelClass

# Of float32 weights on a CPU, megatron-core's own linear layers fail in the backward pass.
DTYPES = [BFLOAT16, FLOAT32] if DEVICE == "cuda" else [BFLOAT16]
POSITIONS = torch.arange(TOKENS.shape[1] - 1, device=DEVICE).expand(len(TOKENS), -1)


def normal(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, dtype)


def logits_and_gradients(
    apply: Callable[..., Any], dtype: torch.dtype, *, forward: bool, backward: bool
) -> list[Tensor]:
    """Of 5 x 3 tokens and 6 experts; `forward` and `backward` say in which pass autocast is on."""
    x, weight = normal(5, 3, 8, dtype=dtype).requires_grad_(), normal(6, 8).requires_grad_()
    with torch.autocast(DEVICE, BFLOAT16, enabled=forward):
        logits = apply(x, weight)
    with torch.autocast(DEVICE, BFLOAT16, enabled=backward):
        logits.backward(normal(5, 3, 6).to(logits.dtype))
    return [logits.detach(), *(one.grad for one in (x, weight) if one.grad is not None)]


@pytest.mark.parametrize("passes", [(True, False), (True, True), (False, True)], ids=["forward", "both", "backward"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_the_router_s_product_is_float32(dtype: torch.dtype, passes: tuple[bool, bool]) -> None:
    forward, backward = passes
    plain = logits_and_gradients(Float32Logits.apply, dtype, forward=False, backward=False)
    cast = logits_and_gradients(Float32Logits.apply, dtype, forward=forward, backward=backward)
    assert [one.dtype for one in cast] == [FLOAT32, dtype, FLOAT32]
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_the_router_s_product_is_traced_under_autocast() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x, weight: Float32Logits.apply(x, weight), fullgraph=True, backend="aot_eager")
    plain = logits_and_gradients(Float32Logits.apply, BFLOAT16, forward=False, backward=False)
    for forward in (False, True):
        traced = logits_and_gradients(compiled, BFLOAT16, forward=forward, backward=False)
        assert [one.dtype for one in traced] == [FLOAT32, BFLOAT16, FLOAT32]
        assert all(torch.equal(one, other) for one, other in zip(plain, traced, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ModelClass)
def test_a_model_s_routers_under_autocast(kind: ModelClass, dtype: torch.dtype) -> None:
    """Each router's logits are those of its input in float32; every parameter has a gradient of its own dtype."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    with model_parallel():
        model: Any = build_model(SMALL, model=kind, params_dtype=dtype, backend="local", **TRAINING_SETTINGS)
        for layer in model.decoder.layers:
            if hasattr(layer.mlp, "router"):
                keep_logits(layer.mlp.router, seen)
        with torch.autocast(DEVICE, BFLOAT16):
            losses = model(TOKENS[:, :-1], POSITIONS, None, labels=TOKENS[:, 1:])
        losses.mean().backward()
    assert len(seen) == SMALL.num_hidden_layers
    for x, weight, logits in seen:
        assert logits.dtype == FLOAT32
        exact = x.double() @ weight.double().T
        assert ((logits - exact).norm() / exact.norm()).item() < 1e-6
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all(), name


def keep_logits(router: Any, seen: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    own = router.gating

    def gating(x: Tensor) -> Tensor:
        logits = own(x)
        seen.append((x.detach(), router.weight.detach(), logits.detach()))
        return logits

    router.gating = gating
