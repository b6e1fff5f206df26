"""Weights' gradients of all experts in one launch, against float64; on a processor in Triton's interpreter."""

from functools import partial

import pytest
import torch
from support.checks import NO_GPU, succeeds_in_triton_s_interpreter
from torch import Tensor

# Triton's interpreter runs the kernel on the CPU; its bfloat16 is not the hardware's, so float16 it is.
INTERPRETED = """
import torch
from compiled.experts import weight_gradients
weight_gradients.OUT_BLOCK, weight_gradients.IN_BLOCK, weight_gradients.ROW_BLOCK = 32, 64, 16
weight_gradients.TALL = 2
torch.manual_seed(0)
rows = [5, 0, 33, 16]
ends = torch.tensor(rows).cumsum(0, dtype=torch.int32)
for out_features, in_features, most in ((96, 136, 1 << 31), (40, 200, 1), (32, 64, 1 << 31)):
    weight_gradients._MANY = most
    tokens = sum(rows) + 3  # the last belong to nobody
    x, grad = torch.randn(tokens, in_features).half(), torch.randn(tokens, out_features).half()
    total = torch.randn(len(rows), out_features, in_features)
    parts = zip(total, grad[:-3].double().split(rows), x[:-3].double().split(rows))
    wanted = [a.double() + b.T @ c for a, b, c in parts]
    weight_gradients.add_weight_gradients(x, grad, total, ends)
    for one, exact in zip(total, wanted):
        assert (one - exact).abs().max() < 1e-5
"""


def test_every_tile_of_every_expert_is_made_once() -> None:
    """Tiles that stick out, an expert without tokens, rows that end inside a block; also counted in 64 bits."""
    succeeds_in_triton_s_interpreter(INTERPRETED)


ones = partial(torch.ones, dtype=torch.bfloat16)


BAD = {
    "dtype": ({"x": ones(5, 16, dtype=torch.float32)}, r"x must be torch.bfloat16 or torch.float16, found"),
    "dtypes": ({"grad": ones(5, 8).half()}, r"grad must be torch.bfloat16 \(5, 8\), found torch.float16"),
    "experts": ({"ends": ones(1, dtype=torch.int32)}, r"ends must be torch.int32 \(2,\), found torch.int32 \(1,\)"),
    "numbers": ({"ends": ones(2, dtype=torch.int64)}, r"ends must be torch.int32 \(2,\), found torch.int64"),
    "gradients": ({"grad": ones(7, 8)}, r"grad must be .* \(5, 8\), found .* \(7, 8\)"),
    "sum": ({"total": ones(2, 8, 16)}, r"total must be torch.float32 \(2, 8, 16\), found torch.bfloat16"),
    "width": (
        {"x": ones(5, 20), "total": ones(2, 8, 20, dtype=torch.float32)},
        r"x: rows must be a multiple of 16 bytes long.* found 20 elements",
    ),
    "strides": ({"x": ones(16, 5).T}, r"x must be contiguous, found strides \(1, 5\)"),
    "address": ({"x": ones(81)[1:].view(5, 16)}, r"x: rows must be .* at an address that is one"),
    "device": ({"grad": torch.ones(5, 8, dtype=torch.bfloat16, device="meta")}, r"where x is, on cpu, found meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    pytest.importorskip("triton")
    from compiled.experts import add_weight_gradients

    total, ends = ones(2, 8, 16, dtype=torch.float32), torch.tensor([3, 5], dtype=torch.int32)
    good = {"x": ones(5, 16), "grad": ones(5, 8), "total": total, "ends": ends}
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        add_weight_gradients(**good | changed)


def test_a_gpu_without_room_for_a_tile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from compiled.experts.weight_gradients import _check_room

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    for capability, fits in {(8, 0): False, (9, 0): True, (10, 0): True, (12, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        if fits:
            _check_room(torch.device("cuda"))
        else:
            with pytest.raises(ValueError, match=rf"A100, of compute capability \({capability[0]}, 0\).* 9 or 10 has"):
                _check_room(torch.device("cuda"))
    _check_room(torch.device("cpu"))


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3072, 3072), (3072, 1536), (96, 64), (136, 200)])
@pytest.mark.parametrize("rows", [[64, 0, 7, 129], [0, 0, 0, 200], [1024, 1000, 1, 65], [0, 0, 0, 0]])
def test_sums_are_those_of_float64(rows: list[int], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Twice, as of two microbatches; off by what float32 sums of so many products may be."""
    from compiled.experts import add_weight_gradients

    out_features, in_features = shape
    generator = torch.Generator("cuda").manual_seed(1)

    def drawn(n: int, width: int) -> Tensor:
        return torch.randn(n, width, device="cuda", generator=generator)

    total = torch.stack([drawn(out_features, in_features) for _ in rows])
    ends = torch.tensor(rows, device="cuda").cumsum(0, dtype=torch.int32)
    wanted = [one.double() for one in total]
    for _ in range(2):
        x, grad = drawn(sum(rows), in_features).to(dtype), drawn(sum(rows), out_features).to(dtype)
        add_weight_gradients(x, grad, total, ends)
        parts = zip(wanted, grad.double().split(rows), x.double().split(rows), strict=True)
        wanted = [a + g.T @ b for a, g, b in parts]
    for n, one, exact in zip(rows, total, wanted, strict=True):
        bound = 4 * (n + 2) ** 0.5 * torch.finfo(torch.float32).eps  # of each product, which is 1 in the mean
        assert (one - exact).norm() <= bound * (out_features * in_features) ** 0.5 * max(n, 1) ** 0.5
