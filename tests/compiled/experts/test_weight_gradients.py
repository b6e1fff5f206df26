"""Weights' gradients of all experts in one launch, against float64; on a processor in Triton's interpreter."""

import pytest
import torch
from support.checks import NO_GPU, fresh_interpreter
from torch import Tensor

# Triton's interpreter runs the kernel on the CPU; its bfloat16 is not the hardware's, so float16 it is.
INTERPRETED = """
import torch
from compiled.experts import weight_gradients
weight_gradients.OUT_BLOCK, weight_gradients.IN_BLOCK, weight_gradients.ROW_BLOCK = 32, 64, 16
weight_gradients.TALL = 2
torch.manual_seed(0)
rows = [5, 0, 33, 16]
for out_features, in_features in ((96, 136), (40, 200), (32, 64)):
    x, grad = torch.randn(sum(rows), in_features).half(), torch.randn(sum(rows), out_features).half()
    total = [torch.randn(out_features, in_features) for _ in rows]
    parts = zip(total, grad.double().split(rows), x.double().split(rows))
    wanted = [a.double() + b.T @ c for a, b, c in parts]
    weight_gradients.add_weight_gradients(x, grad, total, rows)
    for one, exact in zip(total, wanted):
        assert (one - exact).abs().max() < 1e-5
"""


def test_every_tile_of_every_expert_is_made_once() -> None:
    """Tiles that stick out, an expert without tokens, rows that end inside a block."""
    pytest.importorskip("triton")
    result = fresh_interpreter(INTERPRETED, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype)


SUM = ones(8, 16, dtype=torch.float32)
BAD = {
    "dtype": ({"x": ones(5, 16, dtype=torch.float32)}, r"x must be torch.bfloat16 or torch.float16, found"),
    "dtypes": ({"grad": ones(5, 8).half()}, r"grad must be torch.bfloat16 \(5, 8\), found torch.float16"),
    "experts": ({"total": [SUM]}, r"of as many experts, found 1 and 2"),
    "tokens": ({"rows": [3, 3]}, r"x must be .* \(6, 16\), found .* \(5, 16\)"),
    "gradients": ({"grad": ones(7, 8)}, r"grad must be .* \(5, 8\), found .* \(7, 8\)"),
    "sum": ({"total": [SUM, SUM.bfloat16()]}, r"total\[1\] must be torch.float32 \(8, 16\), found"),
    "width": (
        {"x": ones(5, 20), "total": [ones(8, 20, dtype=torch.float32)] * 2},
        r"x: rows must be a multiple of 16 bytes long, found 20 elements",
    ),
    "too many of one": ({"rows": [1 << 28, 2]}, r"fewer than 2\^31 elements, found 268435456 tokens of 16"),
    "strides": ({"x": ones(16, 5).T}, r"x must be contiguous"),
    "address": ({"x": ones(81)[1:].view(5, 16)}, r"x must be contiguous, at an address that is a multiple of 16"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    pytest.importorskip("triton")
    from compiled.experts import add_weight_gradients

    good = {"x": ones(5, 16), "grad": ones(5, 8), "total": [SUM, SUM], "rows": [3, 2]}
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        add_weight_gradients(**good | changed)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3072, 3072), (3072, 1536), (96, 64), (136, 200)])
@pytest.mark.parametrize("rows", [[64, 0, 7, 129], [0, 0, 0, 200], [1024, 1000, 1, 65]])
def test_sums_are_those_of_float64(rows: list[int], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Twice, as of two microbatches; off by what float32 sums of so many products may be."""
    from compiled.experts import add_weight_gradients

    out_features, in_features = shape
    generator = torch.Generator("cuda").manual_seed(1)

    def drawn(n: int, width: int) -> Tensor:
        return torch.randn(n, width, device="cuda", generator=generator)

    total = [drawn(out_features, in_features) for _ in rows]
    wanted = [one.double() for one in total]
    for _ in range(2):
        x, grad = drawn(sum(rows), in_features).to(dtype), drawn(sum(rows), out_features).to(dtype)
        add_weight_gradients(x, grad, total, rows)
        parts = zip(wanted, grad.double().split(rows), x.double().split(rows), strict=True)
        wanted = [a + g.T @ b for a, g, b in parts]
    for n, one, exact in zip(rows, total, wanted, strict=True):
        bound = 4 * (n + 2) ** 0.5 * torch.finfo(torch.float32).eps  # of each product, which is 1 in the mean
        assert (one - exact).norm() <= bound * (out_features * in_features) ** 0.5 * max(n, 1) ** 0.5
