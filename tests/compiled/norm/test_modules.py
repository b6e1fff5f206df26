"""The norms on one CPU process against `reference.norm`: outputs and gradients, memory, recompilation, and the kernels.

float64 is compared exactly, up to the order of sums; lower precisions may be off by twice what the reference itself is
off in that precision. The Triton kernels run here in Triton's interpreter; on a GPU, `test_gpu`.
"""

import os
import subprocess
import sys

import numpy
import pytest
import torch
from packaging.version import Version
from support.checks import ROOT, assert_calibrated, assert_relative
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from compiled import FullDimQKNorm, FullDimRMSNorm, ReplicatedFullDimRMSNorm, RMSNorm
from compiled.norm import modules
from compiled.norm.collectives import ProcessGroupInfo
from reference.norm import full_dim_rms_norm, full_dim_rms_norm_backward, rms_norm
from reference.rope import apply_rotary, rotary_tables

FLOAT64, EPS = torch.float64, 1e-6
# Sums of at most 8192 terms in float64: 8192 x 2^-53 = 9e-13 is the worst case of a plain sum.
FLOAT64_BOUND = 1e-12
# heads, head_dim: widths 64 to 8192, some of them no powers of two
WIDTHS = [
    (1, 64),
    (3, 32),
    (5, 40),
    (6, 128),
    (1, 1000),
    (8, 128),
    (12, 128),
    (1, 3072),
    (7, 480),
    (48, 128),
    (64, 128),
]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def alone() -> None:
    """No process group."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def qk_norm(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = FLOAT64) -> FullDimQKNorm:
    norm = FullDimQKNorm(heads, kv_heads, head_dim, alone, EPS, dtype)
    with torch.no_grad():
        norm.q_weight.copy_(1 + 0.3 * normal(heads * head_dim, seed=1))
        norm.k_weight.copy_(1 + 0.3 * normal(kv_heads * head_dim, seed=2))
    return norm


def reference_fused(mixed: Tensor, wq: Tensor, wk: Tensor, tables: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """What `forward_fused` computes, from the reference's functions."""
    seq, batch, groups, width = mixed.shape
    dim = len(wk) // groups
    query, key, value = mixed.split([width - 2 * dim, dim, dim], -1)
    query = full_dim_rms_norm(query.reshape(seq, batch, -1, dim), wq, eps=EPS)
    key = full_dim_rms_norm(key, wk, eps=EPS)
    if tables:
        query, key = apply_rotary(query, *tables), apply_rotary(key, *tables)
    return [query, key, value]


# ----------------------------------------------------------------------------------------------- outputs and gradients


@pytest.mark.parametrize(("heads", "head_dim"), WIDTHS)
@pytest.mark.parametrize("dtype", [FLOAT64, *LOW])
@pytest.mark.parametrize("module", [FullDimRMSNorm, ReplicatedFullDimRMSNorm])
def test_one_norm(module, heads, head_dim, dtype):
    """y, dx, dw; the input is a view with gaps between its tokens and heads, and one token is zero."""
    x, g, w = normal(5, 2, heads, head_dim), normal(5, 2, heads, head_dim, seed=1), normal(heads * head_dim, seed=2)
    x[2, 1] = 0
    x, g, w = x.to(dtype), g.to(dtype), (1 + 0.3 * w).to(dtype)
    wide = torch.zeros(5, 2, heads, head_dim + 8, dtype=dtype)
    wide[..., :head_dim] = x
    view = wide[..., :head_dim].requires_grad_()
    sizes = (heads, head_dim) if module is ReplicatedFullDimRMSNorm else (heads * head_dim, heads * head_dim)
    norm = module(*sizes, alone, EPS, dtype)
    with torch.no_grad():
        norm.weight.copy_(w)
    y = norm(view)
    y.backward(g)
    ours = {"y": y.detach(), "dx": view.grad, "dw": norm.weight.grad}

    def law(x: Tensor, g: Tensor, w: Tensor) -> dict[str, Tensor]:
        dx, dw = full_dim_rms_norm_backward(g, x, w, eps=EPS)
        return {"y": full_dim_rms_norm(x, w, eps=EPS), "dx": dx, "dw": dw}

    truth, theirs = law(x.to(FLOAT64), g.to(FLOAT64), w.to(FLOAT64)), law(x, g, w)
    for name, value in ours.items():
        if dtype == FLOAT64:
            assert_relative(value, truth[name], FLOAT64_BOUND, name)
        else:
            assert value.dtype == dtype
            assert_calibrated(value, theirs[name], truth[name], name)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rotary"), [(48, 8, 128, 64), (6, 2, 64, 64), (5, 1, 12, 0)])
@pytest.mark.parametrize("dtype", [FLOAT64, *LOW])
def test_fused_qkv(heads, kv_heads, head_dim, rotary, dtype):
    """forward_fused: query, key, value, the fused qkv's gradient and both weights', with partial, full and no RoPE."""
    mixed = normal(4, 2, kv_heads, (heads // kv_heads + 2) * head_dim).to(dtype)
    tables = rotary_tables(torch.arange(3, 7), rotary, 1e4, dtype=dtype) if rotary else ()
    norm = qk_norm(heads, kv_heads, head_dim, dtype)
    leaf = mixed.clone().requires_grad_()
    outputs = norm.forward_fused(leaf, *tables)
    grads = [normal(*x.shape, seed=seed).to(dtype) for seed, x in enumerate(outputs)]
    torch.autograd.backward(outputs, grads)
    ours = [*(x.detach() for x in outputs), leaf.grad, norm.q_weight.grad, norm.k_weight.grad]
    assert all(x.is_contiguous() for x in outputs)

    def law(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (mixed, norm.q_weight, norm.k_weight)]
        outputs = reference_fused(*leaves, tuple(table.to(dtype) for table in tables))
        torch.autograd.backward(outputs, [g.to(dtype) for g in grads])
        return [*(x.detach() for x in outputs), *(leaf.grad for leaf in leaves)]

    names = ("query", "key", "value", "dmixed", "dwq", "dwk")
    for name, value, theirs, truth in zip(names, ours, law(dtype), law(FLOAT64), strict=True):
        if name == "value":
            assert torch.equal(value, theirs)
        elif dtype == FLOAT64:
            assert_relative(value, truth, FLOAT64_BOUND, name)
        else:
            assert_calibrated(value, theirs, truth, name)


def test_gradients_are_the_derivatives():
    """Finite differences, through the views that a split of the fused qkv makes and through the fused form."""
    norm = qk_norm(6, 2, 4)
    tables = rotary_tables(torch.arange(2), 2, 1e4, dtype=FLOAT64)
    mixed = normal(2, 1, 2, 5 * 4).requires_grad_()
    weights = (norm.q_weight, norm.k_weight)

    def fused(mixed: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return norm.forward_fused(mixed, *tables)

    def split(mixed: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        query, key, _ = mixed.split([3 * 4, 4, 4], -1)
        return norm(query.reshape(2, 1, 6, 4), key)

    for function in (fused, split):
        assert torch.autograd.gradcheck(function, (mixed, *weights))


def test_position_tables_may_differ_between_samples():
    """cos and sin of [seq, batch, half]: packed sequences, or samples with their own positions."""
    norm, mixed = qk_norm(4, 2, 8), normal(3, 2, 2, 4 * 8)
    tables = [rotary_tables(torch.arange(3) + start, 4, 1e4, dtype=FLOAT64) for start in (0, 5)]
    together = norm.forward_fused(mixed, *(torch.stack(pair, 1) for pair in zip(*tables, strict=True)))
    for sample, pair in enumerate(tables):
        alone = norm.forward_fused(mixed[:, sample : sample + 1], *pair)
        assert all(torch.equal(a[:, sample : sample + 1], b) for a, b in zip(together, alone, strict=True))


def test_hidden_norm_carries_sequence_parallel():
    norm = RMSNorm(96, EPS, torch.float32, sequence_parallel=True)
    assert norm.weight.sequence_parallel
    x, g = normal(4, 2, 96).float(), normal(4, 2, 96, seed=1).float()
    x.requires_grad_()
    norm(x).backward(g)
    truth = [x.detach().to(FLOAT64).requires_grad_(), norm.weight.detach().to(FLOAT64).requires_grad_()]
    rms_norm(*truth, eps=EPS).backward(g.to(FLOAT64))
    same = [x.detach().requires_grad_(), norm.weight.detach().requires_grad_()]
    rms_norm(*same, eps=EPS).backward(g)
    assert_calibrated(x.grad, same[0].grad, truth[0].grad, "dx")
    assert_calibrated(norm.weight.grad, same[1].grad, truth[1].grad, "dw")


def test_no_tokens_and_no_grad():
    norm = qk_norm(6, 2, 8, torch.float32)
    mixed = torch.zeros(0, 2, 2, 5 * 8, requires_grad=True)
    query, key, value = norm.forward_fused(mixed)
    assert (query.shape, key.shape, value.shape) == ((0, 2, 6, 8), (0, 2, 2, 8), (0, 2, 2, 8))
    (query.sum() + key.sum() + value.sum()).backward()
    assert mixed.grad.shape == mixed.shape
    assert not norm.q_weight.grad.any()
    assert not norm.k_weight.grad.any()
    mixed = normal(3, 1, 2, 5 * 8).float().requires_grad_()
    with torch.no_grad():
        silent = norm.forward_fused(mixed)
    assert not any(x.requires_grad for x in silent)
    assert all(torch.equal(a, b) for a, b in zip(silent, norm.forward_fused(mixed), strict=True))


@pytest.mark.parametrize(("kv_heads", "size"), [(8, 12), (3, 4), (4, 6)])
def test_heads_that_do_not_spread_over_the_ranks_are_refused(kv_heads, size, monkeypatch):
    monkeypatch.setattr(modules, "process_group_info", lambda group: ProcessGroupInfo("ranks", 0, size))
    with pytest.raises(ValueError, match=f"found {kv_heads} heads on {size} ranks"):
        ReplicatedFullDimRMSNorm(kv_heads, 8, alone)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="1 ranks of 64 channels do not hold 96"):
        FullDimRMSNorm(64, 96, alone)
    with pytest.raises(ValueError, match="5 query heads and 2 key heads on 1 ranks"):
        FullDimQKNorm(5, 2, 8, alone)


def test_shapes_that_do_not_fit_are_refused():
    """Before a kernel reads what is not there."""
    norm, x = FullDimQKNorm(6, 2, 8, alone), torch.zeros(3, 1, 2, 5 * 8)
    query, key = torch.zeros(3, 1, 6, 8), torch.zeros(3, 1, 2, 8)
    with pytest.raises(ValueError, match=r"query must be \[seq, batch, 6, 8\]: found \(3, 1, 2, 8\)"):
        norm(key, key)
    with pytest.raises(ValueError, match=r"key must be \[seq, batch, 2, 8\]: found \(3, 1, 6, 8\)"):
        norm(query, query)
    with pytest.raises(ValueError, match=r"mixed_qkv must be \[seq, batch, 2, 40\]: found \(3, 1, 80\)"):
        norm.forward_fused(x.flatten(2))
    table = torch.zeros(3, 2)
    for cos, sin in (
        (table[:2], table[:2]),
        (table, table[:, :1]),
        (table, None),
        (None, table),
        (torch.zeros(3, 5),) * 2,
    ):
        with pytest.raises(ValueError, match="with seq 3, batch 1 and 2 half at most head_dim, 8: found"):
            norm.forward_fused(x, cos, sin)
    with pytest.raises(ValueError, match=r"the weight's 48 channels: found \(3, 1, 2, 8\)"):
        FullDimRMSNorm(48, 48, alone)(key)
    with pytest.raises(ValueError, match="48 channels: found"):
        ReplicatedFullDimRMSNorm(6, 8, alone)(key)
    with pytest.raises(ValueError, match=r"x must be \[seq, batch, 16\], as wide as the weight: found \(3, 1, 8\)"):
        RMSNorm(16)(key[:, :, 0])


# ---------------------------------------------------------------------------------------------- memory and compilation


def test_kept_for_the_backward_pass():
    """Beyond the fused qkv and the weights: 8 bytes a token, for both norms."""
    norm = qk_norm(6, 2, 8, torch.bfloat16)
    mixed = normal(64, 2, 2, 5 * 8).bfloat16().requires_grad_()
    tables = rotary_tables(torch.arange(64), 4, 1e4, dtype=torch.bfloat16)
    known = {x.untyped_storage().data_ptr() for x in (mixed, norm.q_weight, norm.k_weight, *tables)}
    kept = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(note, lambda x: x):
        norm.forward_fused(mixed, *tables)
    assert sum(kept.values()) == 8 * 64 * 2


def test_recomputation_gives_the_same_gradients():
    norm = qk_norm(6, 2, 8)
    grads = []
    for step in (norm.forward_fused, lambda x: checkpoint(norm.forward_fused, x, use_reentrant=False)):
        mixed = normal(5, 2, 2, 5 * 8).requires_grad_()
        query, key, value = step(mixed)
        (query.sin().sum() + key.cos().sum() + value.square().sum()).backward()
        grads.append([mixed.grad, norm.q_weight.grad, norm.k_weight.grad])
        norm.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("form", ["fused", "two parts", "hidden"])
def test_twenty_lengths_compile_at_most_twice(form):
    """Once for the first length and once for any other. Backward too: each compilation makes a pair of graphs."""
    torch._dynamo.reset()
    compilations = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        compilations.append(graph)
        return graph.forward

    norm, hidden = qk_norm(6, 2, 8, torch.float32), RMSNorm(80)

    def step(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if form == "hidden":
            return hidden(x.flatten(2))
        if form == "fused":
            return torch.cat(norm.forward_fused(x, cos, sin), 2)
        query, key, _ = x.split([24, 8, 8], -1)
        return torch.cat(norm(query.reshape(*x.shape[:2], 6, 8), key), 2)

    compiled = torch.compile(step, fullgraph=True, backend=counting)
    for seq in range(3, 23):
        x = normal(seq, 2, 2, 5 * 8).float().requires_grad_()
        tables = rotary_tables(torch.arange(seq), 4, 1e4, dtype=torch.float32)
        y = compiled(x, *tables)
        y.sum().backward()
        assert torch.equal(y, step(x, *tables))
    assert len(compilations) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype):
    """With the default backend, fullgraph: outputs and gradients, calibrated like the eager ones."""
    torch._dynamo.reset()
    norm, tables = qk_norm(6, 2, 8, dtype), rotary_tables(torch.arange(5), 4, 1e4, dtype=dtype)
    results = {}
    for name, step, wide in [
        ("eager", norm.forward_fused, dtype),
        ("compiled", torch.compile(norm.forward_fused, fullgraph=True), dtype),
        ("truth", qk_norm(6, 2, 8).forward_fused, FLOAT64),
    ]:
        module = norm if wide == dtype else step.__self__
        if module is not norm:
            module.load_state_dict(norm.state_dict())
        mixed = normal(5, 2, 2, 5 * 8).to(dtype).to(wide).requires_grad_()
        outputs = step(mixed, *(table.to(wide) for table in tables))
        grads = [normal(*x.shape, seed=seed).to(dtype).to(wide) for seed, x in enumerate(outputs)]
        torch.autograd.backward(outputs, grads)
        results[name] = [*(x.detach() for x in outputs), mixed.grad, module.q_weight.grad, module.k_weight.grad]
        module.zero_grad()
    for eager, compiled, truth in zip(*results.values(), strict=True):
        assert compiled.dtype == dtype
        assert (eager - compiled).abs().max() == 0 or assert_calibrated(compiled, eager, truth) is None


def test_outputs_may_be_changed_in_place():
    """As any module's: the gradient is that of the change made elsewhere."""
    norms = FullDimQKNorm(4, 2, 8, alone, EPS), FullDimRMSNorm(32, 32, alone, EPS), RMSNorm(32, EPS)
    inputs = [normal(3, 2, 4, 8), normal(3, 2, 2, 8)], [normal(3, 2, 4, 8)], [normal(3, 2, 32)]
    for norm, given in zip(norms, inputs, strict=True):
        gradients = []
        for change in (torch.Tensor.mul, torch.Tensor.mul_):
            x = given[0].float().requires_grad_()
            outputs = norm(x, *(other.float() for other in given[1:]))
            y = outputs[0] if isinstance(outputs, tuple) else outputs
            gradients += torch.autograd.grad(change(y, 2.0).square().sum(), x)
        assert torch.equal(*gradients)


def test_the_backward_pass_cannot_be_differentiated():
    norm, x = FullDimRMSNorm(32, 32, alone, EPS), normal(3, 2, 4, 8).float().requires_grad_()
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("what", ["query and key", "q_weight and k_weight"])
def test_two_dtypes_are_refused(what):
    norm, query, key = FullDimQKNorm(4, 2, 8, alone, EPS), normal(3, 2, 4, 8).float(), normal(3, 2, 2, 8).float()
    if what == "query and key":
        key = key.bfloat16()
    else:
        norm.k_weight.data = norm.k_weight.data.bfloat16()
    with pytest.raises(ValueError, match=f"{what} must have one dtype: found torch.float32 and torch.bfloat16"):
        norm(query, key)


# -------------------------------------------------------------------------------------------------- the Triton kernels


def test_kernels_interpreted():
    """Every kernel, at one rank and as each of several ranks, agrees with plain torch."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton 3.6 fails with numpy 2.4 and newer")
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/norm_interpreted.py")],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
