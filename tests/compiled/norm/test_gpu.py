"""The Triton kernels on a GPU: results against `reference.norm` in float64, CUDA graphs, torch.compile, many tokens."""

import pytest
import torch
from support.checks import assert_calibrated
from support.norm_on_gpu import EPS, FLOAT64, normal, qk_norm, rotated
from torch import Tensor

from compiled import FullDimRMSNorm, RMSNorm
from reference.norm import full_dim_rms_norm, rms_norm
from reference.rope import apply_rotary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton kernels need an NVIDIA GPU"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# heads, key heads, head_dim, channels that rotate: the model whole and as its ranks at TP 2, 4 and 8 hold it; odd ones
SIZES = [
    (48, 8, 128, 64), (24, 4, 128, 64), (12, 2, 128, 64), (6, 1, 128, 64),
    (48, 8, 128, 0), (5, 1, 64, 64), (9, 3, 96, 48), (7, 7, 40, 12), (3, 1, 128, 0),
]  # fmt: skip


def split(mixed: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = mixed.split([mixed.shape[-1] - 2 * head_dim, head_dim, head_dim], -1)
    return query.reshape(*mixed.shape[:2], -1, head_dim), key, value


def law(mixed: Tensor, wq: Tensor, wk: Tensor, tables: list[Tensor], head_dim: int) -> list[Tensor]:
    """What forward_fused computes, from the reference's functions."""
    query, key, value = split(mixed, head_dim)
    query, key = full_dim_rms_norm(query, wq, eps=EPS), full_dim_rms_norm(key, wk, eps=EPS)
    if tables:
        query, key = apply_rotary(query, *tables), apply_rotary(key, *tables)
    return [query, key, value]


def with_gradients(step, leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    outputs = step(*leaves)
    used = [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, used)]


def assert_agree(ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for index, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert a.dtype == dtype
        assert torch.isfinite(a).all()
        assert_calibrated(a, b, c, f"result {index}")


def leaves_of(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_qkv(size, dtype):
    """More tokens than programs, so that they walk; strided gradients, as attention may return them; a zero token."""
    heads, kv_heads, head_dim, rotary = size
    norm, tables = qk_norm(heads, kv_heads, head_dim, dtype), rotated(611, rotary, dtype)
    mixed = normal(611, 3, kv_heads, (heads // kv_heads + 2) * head_dim, dtype=dtype)
    mixed[5, 1] = 0
    grads = [normal(3, 611, n, head_dim, dtype=dtype, seed=n).transpose(0, 1) for n in (heads, kv_heads, kv_heads)]
    leaves = leaves_of(dtype, mixed)
    outputs = norm.forward_fused(*leaves, *tables)
    assert all(y.is_contiguous() for y in outputs)
    weights = [norm.q_weight, norm.k_weight]
    ours = [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves + weights, grads)]

    def reference(dtype: torch.dtype) -> list[Tensor]:
        rotate = [table.to(dtype) for table in tables]
        return with_gradients(lambda *x: law(*x, rotate, head_dim), leaves_of(dtype, mixed, *weights), grads)

    assert torch.equal(outputs[2], split(mixed, head_dim)[2])
    value_free = [0, 1, 3, 4, 5]
    assert_agree(*([results[i] for i in value_free] for results in (ours, reference(dtype), reference(FLOAT64))), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_the_fused_qkv(dtype):
    """FullDimQKNorm and FullDimRMSNorm on views with gaps, batch before seq in memory."""
    heads, kv_heads, head_dim = 12, 4, 128
    norm = qk_norm(heads, kv_heads, head_dim, dtype)
    wide = normal(2, 700, heads + 2 * kv_heads, head_dim, dtype=dtype).transpose(0, 1)
    query, key = wide[:, :, :heads], wide[:, :, heads : heads + kv_heads]
    grads = [normal(*x.shape, dtype=dtype, seed=3) for x in (query, key)]
    weights = [norm.q_weight, norm.k_weight]
    singles = [FullDimRMSNorm(w.numel(), w.numel(), lambda: None, EPS, dtype).cuda() for w in weights]
    for single, w in zip(singles, weights, strict=True):
        single.load_state_dict({"weight": w})

    def reference(dtype: torch.dtype) -> list[Tensor]:
        return with_gradients(
            lambda q, k, wq, wk: [full_dim_rms_norm(q, wq, eps=EPS), full_dim_rms_norm(k, wk, eps=EPS)],
            leaves_of(dtype, query, key, *weights),
            grads,
        )

    theirs, truth = reference(dtype), reference(FLOAT64)
    views = [x.detach().requires_grad_() for x in (query, key)]
    assert not views[0].is_contiguous()
    outputs = norm(*views)
    assert_agree([*outputs, *torch.autograd.grad(outputs, views + weights, grads)], theirs, truth, dtype)
    outputs = [single(x) for single, x in zip(singles, views, strict=True)]
    parameters = [single.weight for single in singles]
    assert_agree([*outputs, *torch.autograd.grad(outputs, views + parameters, grads)], theirs, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [64, 1000, 3072, 8192])
def test_hidden_norm(hidden, dtype):
    norm = RMSNorm(hidden, EPS, dtype).cuda()
    x, g = normal(300, 2, hidden, dtype=dtype), normal(300, 2, hidden, dtype=dtype, seed=1)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        return with_gradients(lambda x, w: [rms_norm(x, w, eps=EPS)], leaves_of(dtype, x, norm.weight), [g])

    (leaf,) = leaves_of(dtype, x)
    y = norm(leaf)
    assert_agree([y, *torch.autograd.grad(y, [leaf, norm.weight], g)], reference(dtype), reference(FLOAT64), dtype)


def test_launches_that_differ_in_alignment_alone():
    """A kernel compiled for pointers to multiples of 16 bytes is not used for others, nor the other way round."""
    norm, numel = qk_norm(6, 2, 64, torch.bfloat16), 50 * 2 * 2 * 5 * 64
    memory, results = normal(numel + 8, dtype=torch.bfloat16), {}
    for start in (0, 1, 8, 3):
        mixed = memory[start : start + numel].view(50, 2, 2, 5 * 64).requires_grad_()
        expected = mixed.detach().clone().requires_grad_()
        for leaf in (mixed, expected):
            outputs = norm.forward_fused(leaf)
            results[leaf is mixed] = [*outputs, *torch.autograd.grad(outputs, [leaf, norm.q_weight], outputs)]
        for a, b in zip(*results.values(), strict=True):
            assert (a - b).abs().max() <= 2**-7 * b.abs().max()  # sums in another order: one bf16 step


def test_no_tokens():
    norm = qk_norm(6, 2, 128, torch.bfloat16)
    mixed = normal(0, 2, 2, 5 * 128, dtype=torch.bfloat16).requires_grad_()
    outputs = norm.forward_fused(mixed)
    sum(y.sum() for y in outputs).backward()
    assert mixed.grad.shape == mixed.shape
    assert not norm.q_weight.grad.any()


def test_shared_key_heads_leave_the_others_gradients_zero():
    """What a rank does that shares its key head: it owns some of the group's query heads, here 2 of 6."""
    norm = qk_norm(2, 1, 128, torch.float32)
    norm.heads_per_group, mixed = 6, normal(50, 2, 1, 8 * 128, dtype=torch.float32).requires_grad_()
    outputs = norm._apply_norm((2, 2), None, None, mixed)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    own = torch.cat([mixed.detach()[..., 2 * 128 : 4 * 128], mixed.detach()[..., 6 * 128 :]], -1).requires_grad_()
    norm.heads_per_group = 2
    expected = norm.forward_fused(own)
    torch.autograd.backward(expected, [torch.ones_like(y) for y in expected])
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert torch.equal(mixed.grad[..., 2 * 128 : 4 * 128], own.grad[..., : 2 * 128])
    assert torch.equal(mixed.grad[..., 6 * 128 :], own.grad[..., 2 * 128 :])
    assert not mixed.grad[..., : 2 * 128].any()
    assert not mixed.grad[..., 4 * 128 : 6 * 128].any()


def test_many_tokens_stay_finite():
    """Enough of them that element offsets exceed 32 bits, and the last ones are right."""
    norm, tokens = qk_norm(48, 8, 128, torch.bfloat16), 2**18 + 64
    mixed = torch.randn(tokens, 1, 8, 8 * 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert mixed.numel() > 2**31
    outputs = norm.forward_fused(mixed)
    torch.autograd.backward(outputs, outputs)
    tail = mixed.detach()[-64:].clone().requires_grad_()
    last = norm.forward_fused(tail)
    torch.autograd.backward(last, last)
    assert all(torch.equal(a[-64:], b) for a, b in zip(outputs, last, strict=True))
    assert torch.equal(mixed.grad[-64:], tail.grad)
    assert torch.isfinite(mixed.grad.sum())
    assert torch.isfinite(norm.q_weight.grad).all()


def test_cuda_graph_of_forward_and_backward():
    """Replays on new inputs give what eager runs give, exactly."""
    norm, tables = qk_norm(48, 8, 128, torch.bfloat16), rotated(512, 64, torch.bfloat16)
    static = normal(512, 2, 8, 8 * 128, dtype=torch.bfloat16).requires_grad_()
    grads = [torch.empty(512, 2, n, 128, device="cuda", dtype=torch.bfloat16) for n in (48, 8, 8)]

    def step(mixed: Tensor) -> list[Tensor]:
        outputs = norm.forward_fused(mixed, *tables)
        return [*outputs, *torch.autograd.grad(outputs, [mixed, norm.q_weight, norm.k_weight], grads)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for seed in (5, 6):
        for index, g in enumerate(grads):
            g.copy_(normal(*g.shape, dtype=g.dtype, seed=seed + 10 * index))
        static.data.copy_(normal(*static.shape, dtype=static.dtype, seed=seed))
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(static), strict=True))


def test_torch_compile_fullgraph_and_twenty_lengths():
    """A function around the module is one graph; twenty lengths compile it at most twice."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    norm = qk_norm(12, 4, 128, torch.bfloat16)
    weights = [norm.q_weight, norm.k_weight]

    def step(mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        query, key, value = norm.forward_fused(2 * mixed, cos, sin)
        return query * 3, key.sin(), value

    compiled = torch.compile(step, fullgraph=True)
    for seq in range(30, 50):
        mixed = normal(seq, 2, 4, 5 * 128, dtype=torch.bfloat16, seed=seq).requires_grad_()
        tables = rotated(seq, 64, torch.bfloat16)
        outputs, expected = compiled(mixed, *tables), step(mixed, *tables)
        grads = [normal(*y.shape, dtype=y.dtype, seed=seq) for y in expected]
        ours = torch.autograd.grad(outputs, [mixed, *weights], grads)
        theirs = torch.autograd.grad(expected, [mixed, *weights], grads)
        for a, b in zip((*outputs, *ours), (*expected, *theirs), strict=True):
            # Inductor fuses the factor 2 or the sine without rounding between: one bf16 step.
            assert (a - b).abs().max() <= 2**-7 * b.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
