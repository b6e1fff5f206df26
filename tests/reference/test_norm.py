"""Norms against transformers' MiniMaxM2RMSNorm, their gradient formulas against autograd, shards against the whole."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from support.checks import assert_calibrated, assert_relative, errors
from support.oracles import BFLOAT16, FLOAT32, FLOAT64
from torch import Tensor
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RMSNorm

from reference.norm import full_dim_rms_norm, full_dim_rms_norm_backward, rms_norm, simulate_tensor_parallel

EPS = 1e-6
# Sums of at most 6144 terms in float64: 6144 x 2^-53 = 7e-13 is the worst case of a plain sum.
FLOAT64_BOUND = 1e-12

# seq, batch, heads, head_dim; the last scale makes mean(x^2) as small as eps, where eps decides the result.
SHAPES = [((5, 2, 3, 64), 1.0), ((3, 1, 48, 128), 1.0), ((4, 3, 1, 128), 30.0), ((2, 3, 5, 6), 1e-3)]
DTYPES = [(FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32)]

# ranks, replicas of each head, heads a rank
SHARDINGS = [
    *((ranks, 1, heads) for ranks, heads in [(1, 5), (2, 3), (3, 1), (3, 5), (4, 6), (8, 1)]),
    *((ranks, replicas, 1) for ranks, replicas in [(2, 2), (4, 2), (6, 2), (8, 2), (4, 4), (8, 4), (8, 8)]),
    (6, 3, 2),
]


def draw(shape, scale=1.0, dtype=FLOAT64, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and dL/dy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=FLOAT64) * scale
    weight = 1 + 0.3 * torch.randn(shape[-2] * shape[-1], generator=generator, dtype=FLOAT64)
    return x.to(dtype), weight.to(dtype), torch.randn(shape, generator=generator, dtype=FLOAT64).to(dtype)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """The formula in one line, for autograd."""
    flat = x.flatten(-2)
    return (weight * flat / (flat.pow(2).mean(-1, keepdim=True) + EPS).sqrt()).view(x.shape)


def with_gradients(function, x: Tensor, weight: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad_output.to(y.dtype))


def hf_norm(x: Tensor, weight: Tensor) -> Tensor:
    norm = MiniMaxM2RMSNorm(weight.shape[0], EPS)
    del norm.weight
    norm.weight = weight
    return norm(x)


def hf_full_dim(x: Tensor, weight: Tensor) -> Tensor:
    return hf_norm(x.flatten(-2), weight).view(x.shape)


@pytest.mark.parametrize(("shape", "scale"), SHAPES)
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_forward_is_transformers_bit_for_bit(shape, scale, dtype, weight_dtype):
    x, weight, _ = draw(shape, scale, dtype)
    weight = weight.to(weight_dtype)
    for ours, theirs in [
        (full_dim_rms_norm(x, weight, eps=EPS), hf_full_dim(x, weight)),
        (rms_norm(x.flatten(-2), weight, eps=EPS), hf_norm(x.flatten(-2), weight)),
    ]:
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("shape", "scale"), SHAPES)
def test_float64_values_and_formulas_equal_autograd(shape, scale):
    x, weight, g = draw(shape, scale)
    y, dx, dw = with_gradients(plain, x, weight, g)
    assert_relative(full_dim_rms_norm(x, weight, eps=EPS), y, FLOAT64_BOUND, "y")
    assert_relative(rms_norm(x.flatten(-2), weight, eps=EPS), y.flatten(-2), FLOAT64_BOUND, "rms_norm")
    ours_dx, ours_dw = full_dim_rms_norm_backward(g, x, weight, eps=EPS)
    assert_relative(ours_dx, dx, FLOAT64_BOUND, "dx")
    assert_relative(ours_dw, dw, FLOAT64_BOUND, "dw")


def test_formulas_pass_gradcheck():
    class Law(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return full_dim_rms_norm(x, weight, eps=0.1)

        @staticmethod
        def backward(ctx, grad_output):
            return full_dim_rms_norm_backward(grad_output, *ctx.saved_tensors, eps=0.1)

    x, weight, _ = draw((2, 2, 3, 4))
    assert torch.autograd.gradcheck(Law.apply, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize(("shape", "scale"), SHAPES)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_formulas_round_no_worse_than_transformers_autograd(shape, scale, dtype):
    x, weight, g = draw(shape, scale, dtype)
    _, their_dx, their_dw = with_gradients(hf_full_dim, x, weight, g)
    _, dx, dw = with_gradients(plain, x.double(), weight.double(), g.double())
    ours_dx, ours_dw = full_dim_rms_norm_backward(g, x, weight, eps=EPS)
    assert ours_dx.dtype == ours_dw.dtype == dtype
    assert_calibrated(ours_dx, their_dx, dx, "dx")
    assert_calibrated(ours_dw, their_dw, dw, "dw")


def test_rounding_once_differs_from_twice_and_is_nearer_to_float64():
    x, weight, _ = draw((64, 2, 6, 64), dtype=BFLOAT16)
    twice = full_dim_rms_norm(x, weight, eps=EPS)
    once = full_dim_rms_norm(x, weight, eps=EPS, rounding="once")
    truth = plain(x.double(), weight.double())
    assert once.dtype == BFLOAT16
    assert not torch.equal(twice, once)
    assert errors(once, truth).mean < 0.9 * errors(twice, truth).mean
    # Rounded once from float32, whose own error is far below: the nearest bfloat16 but for exact near-ties.
    assert (once == truth.to(BFLOAT16)).double().mean() > 0.999
    flat = x.flatten(-2)
    assert torch.equal(rms_norm(flat, weight, eps=EPS, rounding="once"), once.flatten(-2))
    assert torch.equal(rms_norm(flat, weight, eps=EPS), twice.flatten(-2))


# ---------------------------------------------------------------------------------------------------- tensor parallel


class Sharded:
    """A norm over all heads and its shards: the whole's y, dx, dw, and what each rank is given."""

    def __init__(self, ranks: int, replicas: int, heads: int, head_dim: int = 4):
        self.ranks, self.replicas = ranks, replicas
        shards = ranks // replicas
        x, weight, g = draw((3, 2, shards * heads, head_dim), seed=ranks * 10 + replicas)
        self.whole = with_gradients(plain, x, weight, g)
        self.n = weight.shape[0]
        self.xs = [part for part in x.chunk(shards, 2) for _ in range(replicas)]
        self.weights = [part for part in weight.chunk(shards) for _ in range(replicas)]
        generator = torch.Generator().manual_seed(ranks)
        self.grads = [part for whole in g.chunk(shards, 2) for part in self._uneven(whole, generator)]

    def _uneven(self, whole: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Random parts of dL/dy, one a replica, that add up to the whole: each replica serves other query heads."""
        parts = list(torch.randn(self.replicas - 1, *whole.shape, generator=generator, dtype=whole.dtype))
        return [*parts, whole - sum(parts)]

    def joined(self, per_rank: list[Tensor], dim: int, *, added: bool) -> Tensor:
        """The whole from the ranks' parts: replicas added up, or (where they must agree) the first taken."""
        groups = [per_rank[i : i + self.replicas] for i in range(0, self.ranks, self.replicas)]
        if not added:
            assert all(torch.equal(part, group[0]) for group in groups for part in group)
        return torch.cat([sum(group) if added else group[0] for group in groups], dim)

    def run_ranks(self, function) -> list:
        """`function(rank, all_reduce)` on a thread a rank; all_reduce waits for every rank and adds the tensors up."""
        barrier, given = Barrier(self.ranks), [torch.empty(0)] * self.ranks
        shapes = []

        def rank_main(rank: int):
            def all_reduce(part: Tensor) -> Tensor:
                given[rank] = part
                barrier.wait(timeout=30)
                total = torch.stack(given).sum(0)
                barrier.wait(timeout=30)
                shapes.append(tuple(part.shape))
                return total

            return function(rank, all_reduce)

        with ThreadPoolExecutor(self.ranks) as pool:
            results = list(pool.map(rank_main, range(self.ranks)))
        self.reduced_shapes = shapes
        return results


@pytest.mark.parametrize(("ranks", "replicas", "heads"), SHARDINGS)
def test_simulated_tensor_parallel_equals_the_whole(ranks, replicas, heads):
    sharded = Sharded(ranks, replicas, heads)
    y, dx, dw = sharded.whole
    shards = simulate_tensor_parallel(sharded.xs, sharded.weights, sharded.grads, eps=EPS, replicas=replicas)
    assert_relative(sharded.joined([shard.y for shard in shards], 2, added=False), y, FLOAT64_BOUND, "y")
    assert_relative(sharded.joined([shard.dx for shard in shards], 2, added=True), dx, FLOAT64_BOUND, "dx")
    assert_relative(sharded.joined([shard.dw for shard in shards], 0, added=False), dw, FLOAT64_BOUND, "dw")

    forward_only = simulate_tensor_parallel(sharded.xs, sharded.weights, eps=EPS, replicas=replicas)
    assert all(torch.equal(a.y, b.y) and b.dx is b.dw is None for a, b in zip(shards, forward_only, strict=True))


@pytest.mark.parametrize(("ranks", "replicas", "heads"), SHARDINGS)
def test_shard_by_shard_with_a_real_all_reduce_equals_the_whole(ranks, replicas, heads):
    sharded = Sharded(ranks, replicas, heads)
    y, dx, dw = sharded.whole
    law = {"eps": EPS, "global_dim": sharded.n, "replicas": replicas}

    def forward(rank, all_reduce):
        return full_dim_rms_norm(sharded.xs[rank], sharded.weights[rank], **law, all_reduce=all_reduce)

    def backward(rank, all_reduce):
        return full_dim_rms_norm_backward(
            sharded.grads[rank], sharded.xs[rank], sharded.weights[rank], **law, all_reduce=all_reduce
        )

    assert_relative(sharded.joined(sharded.run_ranks(forward), 2, added=False), y, FLOAT64_BOUND, "y")
    dxs, dws = zip(*sharded.run_ranks(backward), strict=True)
    assert sharded.reduced_shapes == [(2, 3, 2)] * ranks, "one all-reduce a rank, of two sums a token"
    assert_relative(sharded.joined(dxs, 2, added=True), dx, FLOAT64_BOUND, "dx")
    assert_relative(sharded.joined(dws, 0, added=True), dw, FLOAT64_BOUND, "dw")


@pytest.mark.parametrize(("ranks", "replicas", "heads"), [case for case in SHARDINGS if case[0] > 1])
def test_the_checks_notice_a_missing_backward_all_reduce(ranks, replicas, heads):
    """The defect that this law is written against: S reduced in forward, C left local in backward."""
    sharded = Sharded(ranks, replicas, heads)
    _, dx, dw = sharded.whole
    law = {"eps": EPS, "global_dim": sharded.n, "replicas": replicas}

    def backward(rank, all_reduce):
        def forward_only(sums: Tensor) -> Tensor:
            return torch.stack([all_reduce(sums)[0], sums[1]])

        return full_dim_rms_norm_backward(
            sharded.grads[rank], sharded.xs[rank], sharded.weights[rank], **law, all_reduce=forward_only
        )

    dxs, dws = zip(*sharded.run_ranks(backward), strict=True)
    assert_relative(sharded.joined(dws, 0, added=True), dw, FLOAT64_BOUND, "dw does not need C")
    with pytest.raises(AssertionError, match="dx: off by"):
        assert_relative(sharded.joined(dxs, 2, added=True), dx, FLOAT64_BOUND, "dx")
    assert errors(sharded.joined(dxs, 2, added=True), dx).max > 1e-3 * dx.abs().max()


@pytest.mark.parametrize(
    ("inputs", "weights", "grads", "replicas"), [(2, 1, 2, 1), (2, 2, 1, 1), (3, 3, 3, 2), (1, 2, 2, 1)]
)
def test_simulation_refuses_lists_that_do_not_match(inputs, weights, grads, replicas):
    x, weight, g = draw((2, 1, 1, 4))
    with pytest.raises(ValueError, match=f"found {inputs} inputs, {weights} weights, {grads} output gradients"):
        simulate_tensor_parallel([x] * inputs, [weight] * weights, [g] * grads, eps=EPS, replicas=replicas)
