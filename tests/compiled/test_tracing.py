"""Where torch traces, the modules and functions are operators: same values, and fake tensors like the real results.

Under torch.compile with `fullgraph=True`, in `FakeTensorMode`, on the meta device, and inside a dispatch mode. Fake
tensors can be on a GPU that is not there, so that all of this runs on any host; what a GPU's kernels give is compared
with it where there is one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.checks import NO_GPU
from support.ranks import RankPool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from compiled import FullDimQKNorm, FullDimRMSNorm, RMSNorm
from compiled.fp8 import dequantize_blockwise, quantize_blockwise, requantize_blockwise
from compiled.tracing import is_traced

EPS = 1e-6
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=[NO_GPU, pytest.mark.gpu])]
# Schemas are checked by comparing arguments before and after, which torch cannot do for float8.
WITHOUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Looks(TorchDispatchMode):
    """A mode that writes down the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def normal(*shape: int, device: str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def like(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype, x.stride()


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return like(ours) == like(theirs) and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


# ------------------------------------------------------------------------------------------------------------------ FP8


def fp8_step(weight: Tensor, scale_inv: Tensor, out: Tensor, each: list[Tensor]) -> list[Tensor]:
    """Everything that the functions do: scales fresh, given and rounded up, a slice, `out`, a stack."""
    doubled = weight * 2
    fresh = quantize_blockwise(doubled)
    rounded = quantize_blockwise(doubled, scale_fmt="ue8m0")
    codes, given = quantize_blockwise(weight, scale_inv=scale_inv)
    half = dequantize_blockwise(codes[64:], scale_inv, row_offset=64, dtype=torch.float32)
    dequantize_blockwise(codes, scale_inv, out=out)
    dequantize_blockwise(codes[None].expand(2, -1, -1), scale_inv[None].expand(2, -1, -1), out=each)
    wide = dequantize_blockwise(codes, scale_inv, dtype=torch.float32, check_values=False)
    again, kept = requantize_blockwise(wide, scale_inv)
    mixed = requantize_blockwise(torch.cat([wide[:128], wide[128:] * 1.5]), scale_inv)
    return [*fresh, *rounded, codes, given, half, out, *each, wide + 1, again, kept, *mixed]


def fp8_arguments(rows: int, cols: int, device: str) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    weight = normal(rows, cols, device=device, seed=rows)
    _, scale_inv = quantize_blockwise(weight)
    out = torch.empty(3, rows, cols, dtype=torch.bfloat16, device=device)
    return weight, scale_inv, out[0], [out[1], out[2]]


@pytest.mark.parametrize("device", DEVICES)
def test_fp8_is_called_from_a_function_compiled_with_fullgraph(device: str) -> None:
    backend = "inductor" if device == "cuda" else "aot_eager"  # C++ for the few additions takes a minute
    compiled = torch.compile(fp8_step, fullgraph=True, backend=backend)
    for size in ((300, 200), (256, 384)):  # the second makes the sizes symbols
        eager, traced = ([x.clone() for x in f(*fp8_arguments(*size, device))] for f in (fp8_step, compiled))
        assert all(same_bits(ours, theirs) for ours, theirs in zip(traced, eager, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_wrong_is_said_when_a_traced_call_runs(device: str) -> None:
    codes, scale_inv = quantize_blockwise(normal(130, 140, device=device))
    compile = partial(torch.compile, fullgraph=True, backend="aot_eager")
    decode = compile(lambda *args: dequantize_blockwise(*args, name="w1.weight"))
    codes.view(torch.uint8)[129, 3] = 0x7F
    with pytest.raises(ValueError, match=r"w1\.weight: .*\[129, 3\].* NaN"):
        decode(codes, scale_inv)
    with pytest.raises(ValueError, match=r"w1\.weight_scale_inv: found a grid of \[1, 2\] scales, expected \[2, 2\]"):
        decode(codes, scale_inv[:1])
    with pytest.raises(Exception, match=r"found out of \[130, 140\], torch\.float32, expected .*bfloat16"):
        compile(lambda *args: dequantize_blockwise(*args, out=codes.float()))(codes, scale_inv)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 64])
def test_fp8_operators_pass_torchs_own_checks(device: str, offset: int) -> None:
    operators: Any = torch.ops.minimax_m2
    weight = normal(190, 140, device=device)
    _, scale_inv = quantize_blockwise(weight)
    codes, _ = quantize_blockwise(weight, scale_inv=scale_inv, row_offset=offset)
    before = codes.view(torch.uint8).clone()
    sliced = {"row_offset": offset, "check_values": offset == 0}
    dtype = {"dtype": torch.bfloat16}
    opcheck(operators.fp8_dequantize.default, (codes, scale_inv), dtype | sliced, test_utils=WITHOUT_SCHEMA)
    opcheck(operators.fp8_quantize.default, (weight, scale_inv), sliced)
    opcheck(operators.fp8_quantize_afresh.default, (weight,), {"scale_fmt": "ue8m0"})
    opcheck(operators.fp8_requantize.default, (weight, scale_inv), {})
    assert torch.equal(codes.view(torch.uint8), before)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("shape", [(300, 200), (3, 130, 70)])
def test_fake_results_of_fp8_are_like_real_ones(device: str, shape: tuple[int, ...]) -> None:
    def step(weight: Tensor) -> list[Tensor]:
        codes, scale_inv = quantize_blockwise(weight)
        values = dequantize_blockwise(codes, scale_inv)
        return [codes, scale_inv, values, *requantize_blockwise(values, scale_inv)]

    real = step(normal(*shape))
    with torch.device("meta") if device == "meta" else FakeTensorMode():
        fake = step(torch.empty(shape, device=device))
    assert [like(x) for x in fake] == [like(x) for x in real]
    assert {x.device.type for x in fake} == {device}


# ---------------------------------------------------------------------------------------------------------------- norms


def norm_step(make: Callable[[torch.dtype], Any], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of each form of a norm that is made here, and its gradients.

    Without a GPU there are no gradients of fake tensors that are on one: autograd asks for its context.
    """
    norm = make(dtype)
    if isinstance(norm, FullDimQKNorm):
        x, cos, sin = (torch.randn(n, device=device, dtype=dtype) for n in ((5, 2, 2, 5 * 16), (5, 4), (5, 4)))
        x.requires_grad_()
        outputs = [*norm.forward_fused(x, cos, sin), *norm(x[..., :48].reshape(5, 2, 6, 16), x[..., 48:64])]
    else:
        x = torch.randn(5, 2, 96, device=device, dtype=dtype).requires_grad_()
        outputs = [norm(x if isinstance(norm, RMSNorm) else x.unflatten(-1, (6, 16)))]
    if device == "cuda" and not torch.cuda.is_available():
        return outputs
    return [*outputs, *torch.autograd.grad([y.sum() for y in outputs], [x, *norm.parameters()])]


NORMS: dict[str, Callable[[torch.dtype], Any]] = {
    "queries and keys": lambda dtype: FullDimQKNorm(6, 2, 16, lambda: None, EPS, dtype),
    "all heads": lambda dtype: FullDimRMSNorm(96, 96, lambda: None, EPS, dtype),
    "hidden": lambda dtype: RMSNorm(96, EPS, dtype),
}


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("norm", NORMS)
def test_fake_results_of_norms_are_like_real_ones(norm: str, device: str) -> None:
    """Outputs and gradients, of norms that are made there, without a byte of memory for them."""
    real = norm_step(NORMS[norm], "cpu", torch.bfloat16)
    mode = torch.device("meta") if device == "meta" else FakeTensorMode()
    with mode, torch.device(device):
        fake = norm_step(NORMS[norm], device, torch.bfloat16)
    expected = [like(x) for x in real]
    assert [like(x) for x in fake] == (expected[: len(fake)] if device == "cuda" else expected)
    assert {x.device.type for x in fake} == {device}


@NO_GPU
@pytest.mark.gpu
def test_fake_results_of_norms_are_like_those_of_the_kernels() -> None:
    for make in NORMS.values():
        with torch.device("cuda"):
            real = norm_step(make, "cuda", torch.bfloat16)
            with FakeTensorMode():
                fake = norm_step(make, "cuda", torch.bfloat16)
        assert [(like(x), x.device) for x in fake] == [(like(x), x.device) for x in real]


@NO_GPU
@pytest.mark.gpu
def test_a_mode_sees_the_norms_operators_and_gets_the_same_bits() -> None:
    """In eager mode the kernels are launched from C++, where no mode would see them."""
    with torch.device("cuda"):
        for make in NORMS.values():
            torch.manual_seed(1)
            plain = norm_step(make, "cuda", torch.bfloat16)
            torch.manual_seed(1)
            with Looks() as mode:
                seen = norm_step(make, "cuda", torch.bfloat16)
            assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
            assert {"minimax_m2.norm_forward.default", "minimax_m2.norm_backward.default"} <= set(mode.seen)


@NO_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("split", [(), (0, 3)], ids=["two parts", "fused"])
def test_norm_operators_pass_torchs_own_checks(split: tuple[int, ...]) -> None:
    operators: Any = torch.ops.minimax_m2
    parts = [(5, 2, 2, 5 * 16)] if split else [(5, 2, 6, 16), (5, 2, 2, 16)]
    inputs = [normal(*shape, device="cuda") for shape in parts]
    weights = [normal(n, device="cuda") for n in (96, 32)]
    tables = (normal(5, 4, device="cuda"), normal(5, 4, device="cuda")) if split else (None, None)
    spec = ([96, 32], 1e-6, 16, list(split))
    sums = operators.norm_square_sums(inputs, *spec)
    *ys, rstd = operators.norm_forward(inputs, weights, sums, *tables, *spec)
    grads = [torch.ones_like(y) for y in ys]
    coupling, _ = operators.norm_backward_sums(grads, inputs, weights, rstd, *tables, *spec)
    back = (grads, inputs, weights, rstd)
    for name, arguments in {
        "square_sums": (inputs,),
        "forward": (inputs, weights, sums, *tables),
        "backward": (*back, *tables),
        "backward_sums": (*back, *tables),
        "backward_apply": (*back, coupling, *tables),
    }.items():
        opcheck(getattr(operators, f"norm_{name}").default, (*arguments, *spec))


# ---------------------------------------------------------------------------------------------------------- collectives


def norms_of_a_rank() -> dict[str, list[Any]]:
    """This rank's norm over the heads of two ranks, forward and backward: plain, looked at, and fake."""
    group = torch.distributed.group.WORLD

    def step() -> list[Tensor]:
        norm = FullDimRMSNorm(48, 96, lambda: group)
        x = normal(5, 2, 3, 16, seed=torch.distributed.get_rank()).requires_grad_()
        y = norm(x)
        return [y, *torch.autograd.grad((y * x).sum(), [x, norm.weight])]

    def fake() -> list[Tensor]:
        norm, x = FullDimRMSNorm(48, 96, lambda: group), torch.empty(5, 2, 3, 16, requires_grad=True)
        y = norm(x)
        return [y, *torch.autograd.grad((y * x).sum(), [x, norm.weight])]

    plain = step()
    with Looks() as mode:
        seen = step()
    assert any("_c10d_functional.all_reduce" in operator for operator in mode.seen), mode.seen
    with FakeTensorMode():
        faked = fake()
    with torch.device("meta"):
        meta = fake()
    return {
        "plain": [x.detach() for x in plain],
        "seen": [x.detach().clone() for x in seen],
        "fake": [like(x) for x in faked],
        "meta": [like(x) for x in meta],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks are for a host without GPUs")
def test_norms_over_ranks_are_the_same_where_they_are_looked_at() -> None:
    with RankPool(2) as pool:
        for rank in pool.call(norms_of_a_rank):
            assert all(torch.equal(a, b) for a, b in zip(rank["plain"], rank["seen"], strict=True))
            assert rank["fake"] == rank["meta"] == [like(x) for x in rank["plain"]]


def test_eager_calls_are_not_traced() -> None:
    """Else each would go through the dispatcher, which takes longer than the kernels for few tokens."""
    assert not is_traced(torch.ones(2))
    assert not is_traced(torch.nn.Parameter(torch.ones(2)))
    weight = normal(130, 140)
    with Looks() as mode:
        assert is_traced(weight)
        quantize_blockwise(weight)
    assert "minimax_m2.fp8_quantize_afresh.default" in mode.seen
    assert not any("amax" in operator for operator in mode.seen)  # what it is made of is inside
