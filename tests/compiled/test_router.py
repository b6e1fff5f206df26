"""A router's logits and their gradients, against float64; on a processor in Triton's interpreter."""

from functools import partial

import pytest
import torch
from support.checks import NO_GPU, assert_calibrated, succeeds_in_triton_s_interpreter
from torch import Tensor

# Triton's interpreter runs the kernels on the CPU. Its bfloat16 is not the hardware's: it cuts off where that rounds,
# after which three still are the whole number; and it would multiply the bits as integers: here float32 is multiplied.
SETUP = """
import torch, triton.language as tl
from compiled import router
router.OPERANDS, router.PROGRAMS = tl.float32, 12
router.FORWARD, router.GRAD_X, router.GRAD_WEIGHT = router.Tile(4, 16, 4), router.Tile(8, 16, 4), router.Tile(4, 8, 8)
torch.manual_seed(0)
"""

INTERPRETED = """
for tokens, hidden, experts in ((13, 40, 6), (3, 24, 19), (8, 32, 16), (1, 8, 4), (30, 8, 4), (0, 16, 4)):
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    weight = torch.randn(experts, hidden).requires_grad_()
    grad = torch.randn(tokens, experts)
    y = router.router_logits(x, weight)
    y *= 1  # in place, which autograd would refuse for a view
    y.backward(grad)
    x64, weight64, grad64 = x.detach().double(), weight.detach().double(), grad.double()
    # The terms of an element are up to six products each, padded to whole blocks; each addition rounds by half an eps.
    eps, last = torch.finfo(torch.float32).eps / 2, torch.finfo(torch.bfloat16).eps
    for one, a, b, products, rounded in (
        (y, x64, weight64.T, 3, 0), (x.grad, grad64, weight64, 6, last), (weight.grad, grad64.T, x64, 3, 0)
    ):
        exact, terms = a @ b, a.abs() @ b.abs()
        error = products * (a.shape[1] + 16) * eps * terms
        assert one.shape == exact.shape
        assert ((one - exact).abs() <= error + rounded * (exact.abs() + error)).all(), (tokens, hidden, experts)
"""

EXACT = """
x, weight, grad = torch.eye(40).bfloat16(), torch.randn(19, 40), torch.randn(13, 19)
assert torch.equal(router.router_logits(x, weight), weight.T)
assert torch.equal(router._grad_weight(grad, torch.eye(13).bfloat16()), grad.T)

number = torch.randn(40, 1)
for bits in (16, 8):  # what is left of a number without those is 0, or of few enough bits that bfloat16 has them
    rest = number - (number.view(torch.int32) & -(1 << bits)).view(torch.float32)
    rest = (rest.view(torch.int32) & -(1 << 16)).view(torch.float32)  # the first 8
    pair, signs = torch.cat([number, rest - number], 1), torch.ones(2, 1)
    assert torch.equal(router._grad_x(pair, signs), rest.bfloat16())
    assert torch.equal(router._grad_x(signs.T, pair.T.contiguous()), rest.bfloat16().T)
a = 1 + 2**-9  # squared, less all but the last of its products
assert router._grad_x(torch.tensor([[a, -1 - 2**-8]]), torch.tensor([[a], [1]])).item() == 2**-18
"""


def test_every_product_is_added_once() -> None:
    """Tokens, experts and widths that end inside a tile; sums that one program makes, and several; no tokens."""
    succeeds_in_triton_s_interpreter(SETUP + INTERPRETED)


def test_no_bit_of_a_number_is_lost() -> None:
    """Sums of one product by 1 are the other factor; differences of numbers that are almost equal, to the last bit."""
    succeeds_in_triton_s_interpreter(SETUP + EXACT)


x, weight = partial(torch.ones, dtype=torch.bfloat16), torch.ones


BAD = {
    "dtype": (x(5, 16).half(), weight(4, 16), r"x must be .* torch.bfloat16, found torch.float16 \(5, 16\)"),
    "dimensions": (x(1, 5, 16), weight(4, 16), r"x must be \[tokens, hidden\], .* found torch.bfloat16 \(1, 5, 16\)"),
    "hidden": (x(5, 16), weight(4, 8), r"weight must be \[experts, 16\], .* found torch.float32 \(4, 8\)"),
    "vector": (x(5, 16), weight(16), r"weight must be \[experts, 16\], .* found torch.float32 \(16,\)"),
    "narrow": (x(5, 16), weight(4, 16).bfloat16(), r"weight must be .* torch.float32, found torch.bfloat16 \(4, 16\)"),
    "device": (x(5, 16), weight(4, 16).to("meta"), r"weight must be where x is, on cpu, found meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    pytest.importorskip("triton")
    from compiled.router import router_logits

    x, weight, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        router_logits(x, weight)


def results(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and gradients."""
    from compiled.router import router_logits

    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = router_logits(x, weight)
    grad_x, grad_weight = torch.autograd.grad(logits, (x, weight), grad)
    return logits.detach(), grad_x, grad_weight


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize(
    ("tokens", "hidden", "experts"),
    [(4096, 3072, 32), (4096, 3072, 256), (1000, 1536, 60), (7, 64, 4), (0, 64, 4)],
)
def test_logits_and_gradients_are_as_exact_as_torchs_in_float32(tokens: int, hidden: int, experts: int) -> None:
    """Those of x are rounded to bfloat16 once, which adds at most half of the last place. Two runs are equal."""
    assert not torch.backends.cuda.matmul.allow_tf32
    generator = torch.Generator("cuda").manual_seed(4)
    draw = partial(torch.randn, device="cuda", generator=generator)
    x, weight, grad = draw(tokens, hidden).bfloat16(), draw(experts, hidden) / hidden**0.5, draw(tokens, experts)
    logits, grad_x, grad_weight = found = results(x, weight, grad)
    assert [one.dtype for one in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert [one.shape for one in found] == [grad.shape, x.shape, weight.shape]
    assert all(torch.equal(one, again) for one, again in zip(found, results(x, weight, grad), strict=True))
    if not tokens:
        assert not grad_weight.any()
        return
    x64, weight64, grad64 = x.double(), weight.double(), grad.double()
    assert_calibrated(logits, x.float() @ weight.T, x64 @ weight64.T, "logits")
    assert_calibrated(grad_weight, grad.T @ x.float(), grad64.T @ x64, "weight's gradient")
    exact = grad64 @ weight64
    error = 2 * (grad @ weight - exact).abs().max()
    half = torch.finfo(torch.bfloat16).eps / 2
    assert ((grad_x - exact).abs() <= half * (exact.abs() + error) + error).all()
