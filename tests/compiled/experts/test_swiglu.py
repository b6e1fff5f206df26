"""Weighted SwiGLU and its gradients, against float64; on a processor in Triton's interpreter."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.checks import NO_GPU, succeeds_in_triton_s_interpreter

# Triton's interpreter runs the kernels on the CPU; its bfloat16 is not the hardware's, so float16 it is.
INTERPRETED = """
import torch
from compiled.experts import swiglu
swiglu.BLOCK = 16
torch.manual_seed(0)
for tokens, width in ((5, 40), (3, 16), (1, 8), (0, 16)):
    x = torch.randn(tokens, 2 * width).half().requires_grad_()
    weights = torch.rand(tokens, 1).requires_grad_()
    grad = torch.randn(tokens, width).half()
    y = swiglu.weighted_swiglu(x, weights)
    y.backward(grad)
    x64, weights64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    a, b = x64.chunk(2, -1)
    exact = weights64 * torch.nn.functional.silu(a) * b
    exact.backward(grad.double())
    eps = torch.finfo(torch.float16).eps
    for one, other, bound in ((y, exact, eps), (x.grad, x64.grad, eps), (weights.grad, weights64.grad, 1e-6)):
        assert one.shape == other.shape
        assert torch.allclose(one.double(), other, rtol=bound, atol=bound * 4), (one - other).abs().max()
"""


def test_every_element_of_every_row_is_made_once() -> None:
    """Rows that end inside a block, and no rows."""
    succeeds_in_triton_s_interpreter(INTERPRETED)


ones = partial(torch.ones, dtype=torch.bfloat16)


BAD = {
    "dtype": (ones(5, 16).float(), ones(5, 1), r"x must be .* torch.bfloat16 or torch.float16, found torch.float32"),
    "odd": (ones(5, 15), ones(5, 1), r"x must be \[tokens, 2 \* width\], .* found torch.bfloat16 \(5, 15\)"),
    "dimensions": (ones(1, 5, 16), ones(5, 1), r"x must be .* found torch.bfloat16 \(1, 5, 16\)"),
    "weights": (ones(5, 16), ones(5), r"weights must be \(5, 1\), .* found torch.bfloat16 \(5,\)"),
    "wide": (ones(5, 16), ones(5, 1).double(), r"weights must be .* float32 or narrower, found torch.float64"),
    "device": (ones(5, 16), ones(5, 1).to("meta"), r"weights must be where x is, on cpu, found meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    pytest.importorskip("triton")
    from compiled.experts import weighted_swiglu

    x, weights, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        weighted_swiglu(x, weights)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(4097, 1536), (7, 24), (64, 1000), (0, 64)])
def test_outputs_and_gradients_are_those_of_float64(
    tokens: int, width: int, dtype: torch.dtype, of_weights: torch.dtype
) -> None:
    """Rounded once; weights' gradients are float32 sums of a row, rounded to the weights' dtype."""
    from compiled.experts import weighted_swiglu

    generator = torch.Generator("cuda").manual_seed(2)
    x = torch.randn(tokens, 2 * width, device="cuda", generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(tokens, 1, device="cuda", generator=generator).to(of_weights).requires_grad_()
    grad = torch.randn(tokens, width, device="cuda", generator=generator).to(dtype)
    y = weighted_swiglu(x, weights)
    y.backward(grad)
    x64, weights64 = (one.detach().double().requires_grad_() for one in (x, weights))
    a, b = x64.chunk(2, -1)
    exact = weights64 * F.silu(a) * b
    exact.backward(grad.double())
    assert x.grad is not None
    assert x64.grad is not None
    assert weights.grad is not None
    assert weights64.grad is not None
    half, single = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    rounded = torch.finfo(of_weights).eps
    assert torch.allclose(y.double(), exact, rtol=half, atol=half * 1e-2)
    assert torch.allclose(x.grad.double(), x64.grad, rtol=half, atol=half * 1e-2)
    terms = (grad.double() * F.silu(a) * b).norm(dim=-1, keepdim=True)  # of a sum: errors add up as their squares do
    assert ((weights.grad - weights64.grad).abs() <= 32 * single * terms + rounded * weights64.grad.abs()).all()
