"""A step of Adam over many tensors, against float64; on a processor in Triton's interpreter."""

from typing import Any

import pytest
import torch
from support.checks import NO_GPU, succeeds_in_triton_s_interpreter
from torch import Tensor

INTERPRETED = """
import torch
from compiled import adam
adam.BLOCK, adam.BLOCKS = 16, 2
torch.manual_seed(0)
LENGTHS = 16, 80, 5, 1, 0, 33, 32, 31, 64
drawn = [[torch.randn(n), torch.randn(n), torch.randn(n), torch.rand(n)] for n in LENGTHS]
drawn.append([torch.rand(33)[1:] for _ in range(4)])  # at addresses that are no multiples of 16
rounded = [None if n % 2 else torch.zeros(len(row[0]), dtype=torch.bfloat16) for n, row in enumerate(drawn)]
tensors = [adam.AdamTensors(*row, half) for row, half in zip(drawn, rounded)]
settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
for step in (1, 2, 7):
    before = [[one.clone() for one in row] for row in drawn]
    adam.adam_step(tensors, torch.tensor(torch.nan), step=step, **settings)
    assert all(torch.equal(one, other) for row, others in zip(drawn, before) for one, other in zip(row, others))
    adam.adam_step(tensors, torch.tensor(0.25), step=step, **settings)
    for old, (grad, weight, exp_avg, exp_avg_sq), half in zip(before, drawn, rounded):
        assert torch.equal(grad, old[0])
        g, w, m, v = (one.double() for one in old)
        g = 0.25 * g
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.1 * (m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8) + 0.1 * w)
        for one, exact in ((weight, w), (exp_avg, m), (exp_avg_sq, v)):  # some 12 roundings, of numbers up to 4
            assert torch.allclose(one.double(), exact, rtol=6 * 2**-23, atol=24 * 2**-23), (step, one - exact)
        assert half is None or torch.allclose(half.float(), weight, rtol=2**-7)
"""


def test_every_element_is_moved_once() -> None:
    """Tensors that end inside a block, of no elements, with a rounded copy and without; and none if told so."""
    succeeds_in_triton_s_interpreter(INTERPRETED)


def row(**changed: Any) -> Any:
    from compiled.adam import AdamTensors

    return AdamTensors(**{name: torch.zeros(8) for name in AdamTensors._fields[:4]} | changed)


SCALE = torch.ones(())
BAD = {
    "scale": (torch.ones(1), {}, 1, r"scale must be torch.float32 and a scalar, found torch.float32 \(1,\)"),
    "wide": (torch.ones(()).double(), {}, 1, r"scale must be torch.float32 .* found torch.float64"),
    "step": (SCALE, {}, 0, "step must be 1 or more, found 0"),
    "gradient": (SCALE, {"grad": torch.zeros(8).bfloat16()}, 1, r"tensors\[1\].grad must be .* found torch.bfloat16"),
    "weight": (SCALE, {"weight": torch.zeros(8).double()}, 1, r"tensors\[1\].weight must be .* found torch.float64"),
    "length": (SCALE, {"exp_avg": torch.zeros(9)}, 1, r"tensors\[1\].exp_avg must be .* 8 elements.* 9 elements"),
    "strides": (SCALE, {"exp_avg_sq": torch.zeros(16)[::2]}, 1, r"tensors\[1\].exp_avg_sq must be .* strides \(2,\)"),
    "device": (SCALE, {"exp_avg": torch.zeros(8, device="meta")}, 1, r"tensors\[1\].exp_avg .* on cpu, .* on meta"),
    "rounded": (
        SCALE,
        {"rounded": torch.zeros(8)},
        1,
        r"tensors\[1\].rounded must be torch.bfloat16, .* torch.float32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    """The second tensor is at fault, and the first is not moved."""
    pytest.importorskip("triton")
    from compiled.adam import adam_step

    scale, changed, step, message = BAD[name]
    good = row(grad=torch.ones(8))
    with pytest.raises(ValueError, match=message):
        adam_step([good, row(**changed)], scale, lr=1.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, step=step)
    assert not good.weight.any()
    assert not good.exp_avg.any()


SHAPES = (1, 64, 3072, 1000003, (1536, 3072), (0, 8))  # of one call
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def off(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error, over an element's size or 1e-3."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True) if a.numel()]
    return max(float(((a - b).abs() / b.abs().clamp(min=1e-3)).max()) for a, b in pairs)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("offset", [0, 1])
def test_ten_steps_are_those_of_float64(offset: int) -> None:
    """At most twice as far off as `torch.optim.AdamW` in float32, of gradients clipped before.

    Tensors begin `offset` elements into their storage, and so at addresses that are multiples of 16 or are not.
    """
    from compiled.adam import AdamTensors, adam_step

    generator = torch.Generator("cuda").manual_seed(3)

    def drawn(shape: Any) -> Tensor:
        length = torch.Size((shape,) if isinstance(shape, int) else shape).numel()
        return torch.randn(length + offset, device="cuda", generator=generator)[offset:].reshape(shape)

    started = [drawn(shape) for shape in SHAPES]
    ours = []
    for w, shape in zip(started, SHAPES, strict=True):
        zeros = torch.zeros_like(w)
        ours.append(AdamTensors(drawn(shape), w.clone(), zeros, zeros.clone(), zeros.bfloat16()))
    theirs = {
        dtype: [w.clone().to(dtype).requires_grad_() for w in started] for dtype in (torch.float32, torch.float64)
    }
    optimizers = {dtype: torch.optim.AdamW(of, foreach=False, **SETTINGS) for dtype, of in theirs.items()}
    for step in range(1, 11):
        scale = torch.rand((), device="cuda", generator=generator)
        for one, shape in zip(ours, SHAPES, strict=True):
            one.grad.copy_(drawn(shape))
        for dtype, optimizer in optimizers.items():
            for one, parameter in zip(ours, theirs[dtype], strict=True):
                parameter.grad = one.grad.to(dtype) * scale.to(dtype)
            optimizer.step()
        adam_step(ours, scale, step=step, **SETTINGS)
    of_ours = {"weight": [one.weight for one in ours], "exp_avg": [one.exp_avg for one in ours],
               "exp_avg_sq": [one.exp_avg_sq for one in ours]}  # fmt: skip
    for name, found in of_ours.items():
        exact, near = (
            [p.detach() if name == "weight" else optimizers[dtype].state[p][name] for p in theirs[dtype]]
            for dtype in (torch.float64, torch.float32)
        )
        ours_off, theirs_off = off(found, exact), off(near, exact)
        print(name, "off float64:", ours_off, "torch:", theirs_off)
        assert ours_off <= 2 * theirs_off
    assert all(torch.equal(one.rounded, one.weight.bfloat16()) for one in ours if one.rounded is not None)


@pytest.mark.gpu
@NO_GPU
def test_by_nan_nothing_is_moved() -> None:
    from compiled.adam import AdamTensors, adam_step

    of_float32 = [torch.randn(3000, device="cuda") for _ in range(4)]
    row = AdamTensors(*of_float32, rounded=of_float32[0].bfloat16())
    before = [one.clone() for one in row if one is not None]
    adam_step([row], torch.full((), torch.nan, device="cuda"), step=1, **SETTINGS)
    assert all(torch.equal(one, other) for one, other in zip(row, before, strict=True) if one is not None)
