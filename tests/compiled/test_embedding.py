"""An embedding's gradient, added to the rows that were looked up, against float64; on a processor interpreted."""

import pytest
import torch
from support.checks import NO_GPU, succeeds_in_triton_s_interpreter
from torch import Tensor

# Triton's interpreter runs the kernel on the CPU; its bfloat16 is not the hardware's, so float16 it is.
INTERPRETED = """
import torch
from compiled import embedding
embedding.TOKENS, embedding.COLUMNS = 4, 16
torch.manual_seed(0)
drawn = torch.randint(0, 20, (3, 11))
several = drawn.clone()
several[:, 2:9] = 7  # more of one token than are added at a time, and as many as that, twice
for tokens, width in ((drawn, 40), (several, 16), (torch.full((8,), 3), 8), (torch.tensor([19]), 24), (drawn[:0], 8)):
    for dtype in (torch.float16, torch.float32):
        grad = torch.randn(*tokens.shape, width).to(dtype)
        total = torch.randn(20, width)
        exact = total.double().index_add(0, tokens.flatten(), grad.flatten(0, -2).double())
        embedding.add_embedding_gradient(grad, tokens, total)
        assert (total - exact).abs().max() < 1e-5
"""


def test_every_token_is_added_once() -> None:
    """Tokens that occur once, often, in every place, and not; rows that end inside a block."""
    succeeds_in_triton_s_interpreter(INTERPRETED)


TOTAL = torch.zeros(10, 8)
BAD = {
    "dimensions": ({"total": torch.zeros(10, 8, 1)}, r"total must be \[rows, width\] and contiguous, found \(10, 8, 1"),
    "strides": (
        {"total": torch.zeros(8, 10).T},
        r"total must be .* contiguous, found \(10, 8\) with strides \(1, 10\)",
    ),
    "shape": ({"grad": torch.zeros(2, 4, 8)}, r"grad must be \(2, 3, 8\), found \(2, 4, 8\)"),
    "width": ({"grad": torch.zeros(2, 3, 9)}, r"grad must be \(2, 3, 8\), found \(2, 3, 9\)"),
    "dtype": ({"grad": torch.zeros(2, 3, 8).double()}, r"grad must be one of .* found torch.float64"),
    "sums": ({"total": TOTAL.long()}, r"total must be one of .* found torch.int64"),
    "tokens": ({"tokens": torch.zeros(2, 3)}, r"tokens must be torch.int64 or torch.int32, found torch.float32"),
    "device": ({"grad": torch.zeros(2, 3, 8, device="meta")}, r"grad must be where total is, on cpu, found meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    pytest.importorskip("triton")
    from compiled.embedding import add_embedding_gradient

    good = {"grad": torch.zeros(2, 3, 8), "tokens": torch.zeros(2, 3, dtype=torch.long), "total": TOTAL}
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        add_embedding_gradient(**good | changed)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sums", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_sums_are_those_of_float64_and_the_same_each_time(share: float, sums: torch.dtype, dtype: torch.dtype) -> None:
    """A share of the tokens are the same."""
    from compiled.embedding import add_embedding_gradient

    generator = torch.Generator("cuda").manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    tokens = torch.randint(0, 1000, (2, 2048), device="cuda", generator=generator)
    tokens[torch.rand(tokens.shape, device="cuda", generator=generator) < share] = 999
    grad, before = drawn(2, 2048, 3072).to(dtype), drawn(1000, 3072).to(sums)
    exact = before.double().index_add(0, tokens.flatten(), grad.double().flatten(0, 1))
    found = [before.clone() for _ in range(2)]
    for total in found:
        add_embedding_gradient(grad, tokens, total)
    assert torch.equal(*found)
    often = tokens.flatten().bincount(minlength=1000)
    assert torch.equal(found[0][often == 0], before[often == 0])
    squares = torch.zeros_like(exact).index_add(0, tokens.flatten(), grad.double().flatten(0, 1).square())
    rounded = 0.505 * torch.finfo(sums).eps * exact.abs()  # of the whole, once
    of_sums = 4 * torch.finfo(torch.float32).eps * often[:, None].sqrt() * squares.sqrt()  # errors add up as squares do
    assert ((found[0] - exact).abs() <= rounded + of_sums).all()
