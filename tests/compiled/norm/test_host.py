"""`host` on a GPU: its launches against those from Python, bit for bit.

What its C++ does between the launches is tested by `test_modules` (Triton's interpreter) and `test_gloo` (ranks).
"""

import threading
from collections.abc import Callable
from itertools import product

import pytest
import torch
from support.checks import NO_GPU
from support.norm_on_gpu import EPS, normal, qk_norm, rotated
from torch import Tensor, nn

from compiled import FullDimQKNorm, RMSNorm
from compiled.norm import host
from compiled.triton_launch import Launcher

# heads, key heads, head_dim, channels that rotate, dtype
SIZES = [
    (48, 8, 128, 64, torch.bfloat16), (6, 1, 128, 64, torch.float32),
    (9, 3, 96, 48, torch.float16), (7, 7, 40, 12, torch.float32), (3, 1, 128, 0, torch.bfloat16),
]  # fmt: skip


def outcome(norm: nn.Module, inputs: list[Tensor], tables: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients; the outputs' gradients have gaps, as attention may return them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    fused = isinstance(norm, FullDimQKNorm) and len(leaves) == 1
    outputs = norm.forward_fused(*leaves, *tables) if fused else norm(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    grads = [normal(*y.shape[:-1], 2 * y.shape[-1], dtype=y.dtype).to(y.device)[..., ::2] for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*leaves, *norm.parameters()], grads)]


@pytest.fixture
def python(monkeypatch):
    """Runs a function with the norms called from Python."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(host, "head_norm", lambda *args: None)
            return function(*args)

    return run


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"result {index}: off by {(a - b).abs().max()}"


def forms(size: tuple, tokens: int, start: int, seed: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Each form of a norm on new numbers, some elements into their memory; batch comes first there for the views."""
    heads, kv_heads, dim, rotary, dtype = size
    norm, hidden_norm = qk_norm(heads, kv_heads, dim, dtype), RMSNorm(heads * dim, EPS, dtype).cuda()
    memory = normal(2 * tokens * (heads + 2 * kv_heads) * dim + start, dtype=dtype, seed=seed)[start:]
    tables = rotated(tokens, rotary, dtype)
    views = list(memory.view(2, tokens, -1, dim).transpose(0, 1)[:, :, kv_heads:].split([heads, kv_heads], 2))
    return {
        "fused": lambda: outcome(norm, [memory.view(tokens, 2, kv_heads, -1)], tables),
        "two parts": lambda: outcome(norm, views, []),
        "hidden": lambda: outcome(hidden_norm, [views[0].flatten(2)], []),
    }


def refuse(*args, **kwargs):
    raise AssertionError("launched from Python")


@NO_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_launches_equal_those_from_python(python, size, monkeypatch):
    """First calls and later ones, which Python no longer launches; fewer tokens than programs and more; not aligned."""
    for tokens, start in product((1, 37, 700, 5000), (0, 3)):
        first, later = (forms(size, tokens, start, seed) for seed in (0, 1))
        expected = {name: python(run) for name, run in later.items()}
        for name, run in first.items():
            assert_same(run(), python(run))
            with monkeypatch.context() as patch:
                patch.setattr(Launcher, "__call__", refuse)
                found = later[name]()
            assert_same(found, expected[name])


@NO_GPU
@pytest.mark.gpu
def test_one_kind_for_all_lengths(python, monkeypatch):
    """Of the fused qkv, whose strides do not depend on the length; more tokens than at the first call, and fewer."""
    size = SIZES[0]
    forms(size, 700, 0, seed=0)["fused"]()
    for tokens in (5000, 37):
        run = forms(size, tokens, 0, seed=tokens)["fused"]
        expected = python(run)
        with monkeypatch.context() as patch:
            patch.setattr(Launcher, "__call__", refuse)
            found = run()
        assert_same(found, expected)


@NO_GPU
@pytest.mark.gpu
def test_streams_and_threads(python):
    """A launch goes to its caller's current stream; a thread that has not used the GPU before may call."""
    norm, mixed = qk_norm(48, 8, 128, torch.bfloat16), normal(3000, 1, 8, 8 * 128, dtype=torch.bfloat16)
    expected, found = python(outcome, norm, [mixed], []), []
    assert_same(outcome(norm, [mixed], []), expected)

    def call() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # some 30 ms: on another stream, what follows would read what is not there
            late = torch.empty_like(mixed).copy_(mixed)
            found.extend(outcome(norm, [late], []))
        stream.synchronize()

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert_same(found, expected)
    leaf = mixed.detach().requires_grad_()

    def forward_alone() -> None:
        found[:] = norm.forward_fused(leaf)

    thread = threading.Thread(target=forward_alone)  # its first use of the GPU
    thread.start()
    thread.join()
    assert_same(found, expected[:3])


@NO_GPU
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("launched_from", ["C++", "Python"])
def test_tensors_decide_on_the_device(launched_from, monkeypatch):
    if launched_from == "Python":
        monkeypatch.setattr(host, "head_norm", lambda *args: None)
    results = []
    for device in ("cuda:0", "cuda:1"):
        norm = qk_norm(12, 4, 128, torch.bfloat16).to(device)
        mixed = normal(600, 1, 4, 5 * 128, dtype=torch.bfloat16).to(device)
        for _ in range(2):
            results.append([x.cpu() for x in outcome(norm, [mixed], [])])
    assert torch.cuda.current_device() == 0
    for other in results[1:]:
        assert_same(other, results[0])


@NO_GPU
@pytest.mark.gpu
def test_errors():
    norm, mixed = qk_norm(12, 4, 128, torch.float32), normal(5, 1, 4, 5 * 128, dtype=torch.float32).requires_grad_()
    with pytest.raises(ValueError, match="found a tensor on cpu beside one on cuda:0"):
        norm.cpu().forward_fused(mixed)
    query, _, _ = norm.cuda().forward_fused(mixed)
    (grad,) = torch.autograd.grad(query.square().sum(), mixed, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated: leave out create_graph"):
        grad.sum().backward()
