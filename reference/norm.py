"""RMSNorm, and MiniMax-M2's RMSNorm over all heads at once, with its gradient under tensor parallelism.

The query norm has one weight per channel of all heads together (48 x 128) and one root mean square a token. Under
tensor parallelism a rank holds some of the heads, so the sum of squares, and in the backward pass the sum that couples
all channels, must be summed over the ranks. With g = dL/dy, N = all heads x head_dim, and R ranks holding each head:

    S = all_reduce(sum over local heads of x^2) / R       r = (S/N + eps)^(-1/2)
    C = all_reduce(sum over local heads of w g x)
    dx = r w g - x r^3 C / (N R)                          dw = sum over tokens of g x r

R > 1 for keys when there are more ranks than key/value heads. Each replica then sees the gradient of its own query
heads only: its dx is a share (the shares add up to the whole), and dw must still be summed over the replicas.

The all-reduce is an argument, so that these functions need no processes. Dtypes narrower than float32 are computed in
float32 and rounded twice, as Hugging Face does: y = w * round(x r). Float64 stays float64.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Rounding = Literal["twice", "once"]
AllReduce = Callable[[Tensor], Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to calculate in: float32, or wider where the input is."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(
    x: Float[Tensor, "*tokens hidden"], weight: Float[Tensor, " hidden"], *, eps: float, rounding: Rounding = "twice"
) -> Float[Tensor, "*tokens hidden"]:
    """y = w x (mean(x^2) + eps)^(-1/2), over the last axis.

    Source: `transformers` minimax_m2: MiniMaxM2RMSNorm, which is `rounding="twice"`; "once" rounds only the result.
    """
    wide = x.to(compute_dtype(x.dtype))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _scale(wide * r, weight, x.dtype, rounding)


def full_dim_rms_norm(
    x: Float[Tensor, "seq batch heads head_dim"],
    weight: Float[Tensor, " heads*head_dim"],
    *,
    eps: float,
    global_dim: int | None = None,
    replicas: int = 1,
    all_reduce: AllReduce | None = None,
    rounding: Rounding = "twice",
) -> Float[Tensor, "seq batch heads head_dim"]:
    """RMSNorm over all heads of a token: y = w x r with r = (S/N + eps)^(-1/2), S the sum of squares over all heads.

    Source: `transformers` minimax_m2: MiniMaxM2Attention.q_norm, k_norm, which norm before the split into heads.

    Args:
        x: this rank's heads.
        weight: this rank's shard, head after head.
        eps: added to the mean square, inside the root.
        global_dim: N, all ranks' heads x head_dim; None means that this rank holds all heads.
        replicas: R, how many ranks hold each head.
        all_reduce: sums a tensor over the tensor-parallel ranks; None means one rank.
    """
    flat = x.flatten(-2)
    wide = flat.to(compute_dtype(x.dtype))
    total = _reduced(wide.square().sum(-1, keepdim=True), all_reduce) / replicas
    r = torch.rsqrt(total / (global_dim or flat.shape[-1]) + eps)
    return _scale(wide * r, weight, x.dtype, rounding).view(x.shape)


def full_dim_rms_norm_backward(
    grad_output: Float[Tensor, "seq batch heads head_dim"],
    x: Float[Tensor, "seq batch heads head_dim"],
    weight: Float[Tensor, " heads*head_dim"],
    *,
    eps: float,
    global_dim: int | None = None,
    replicas: int = 1,
    all_reduce: AllReduce | None = None,
) -> tuple[Float[Tensor, "seq batch heads head_dim"], Float[Tensor, " heads*head_dim"]]:
    """dx = r w g - x r^3 C / (N R) and dw = sum over tokens of g x r, for this rank's heads.

    The symbols are the module docstring's, the arguments `full_dim_rms_norm`'s. `all_reduce` is called once, on
    [2, seq, batch]: each token's two sums, S (not yet divided by R) and C. With `replicas` > 1, dx is this replica's
    share, and dw is not yet summed over the replicas.
    """
    dtype = compute_dtype(x.dtype)
    wide, g, w = x.flatten(-2).to(dtype), grad_output.flatten(-2).to(dtype), weight.to(dtype)
    n = global_dim or wide.shape[-1]
    total, coupling = _reduced(_token_sums(wide, g, w), all_reduce).unsqueeze(-1)
    r = torch.rsqrt(total / replicas / n + eps)
    dx = r * w * g - wide * r**3 * coupling / (n * replicas)
    dw = (g * wide * r).sum((0, 1))
    return dx.to(x.dtype).view(x.shape), dw.to(weight.dtype)


class Shard(NamedTuple):
    """What one simulated rank ends with: its output, its share of dx, and dw (None where no gradient was given)."""

    y: Tensor
    dx: Tensor | None
    dw: Tensor | None


def simulate_tensor_parallel(
    xs: list[Tensor],
    weights: list[Tensor],
    grad_outputs: list[Tensor] | None = None,
    *,
    eps: float,
    replicas: int = 1,
) -> list[Shard]:
    """The norm and its gradients on every rank of a tensor-parallel group, computed in one process.

    Rank i holds `xs[i]` ([seq, batch, heads, head_dim]) and `weights[i]`; with `replicas` = R, ranks R j to R j + R - 1
    hold the same heads, and `grad_outputs[i]` is the part of dL/dy that reaches rank i. dw is summed over replicas.

    Raises:
        ValueError: the lists' lengths differ, or R does not divide them.
    """
    grads = grad_outputs if grad_outputs is not None else [None] * len(xs)
    if not len(xs) == len(weights) == len(grads) or len(xs) % replicas:
        raise ValueError(
            f"expected one shard for each rank, and a multiple of {replicas} (replicas) ranks: found {len(xs)} inputs, "
            f"{len(weights)} weights, {len(grads)} output gradients"
        )
    n = sum(x.shape[-2] * x.shape[-1] for x in xs) // replicas
    flats = [x.flatten(-2).to(compute_dtype(x.dtype)) for x in xs]
    squares = _sum(flat.square().sum(-1, keepdim=True) for flat in flats)
    law = {"eps": eps, "global_dim": n, "replicas": replicas}
    ys = [full_dim_rms_norm(x, w, **law, all_reduce=lambda _: squares) for x, w in zip(xs, weights, strict=True)]
    if grad_outputs is None:
        return [Shard(y, None, None) for y in ys]
    sums = _sum(
        _token_sums(x, g.flatten(-2).to(x.dtype), w.to(x.dtype))
        for x, g, w in zip(flats, grad_outputs, weights, strict=True)
    )
    dxs, dws = zip(
        *(
            full_dim_rms_norm_backward(g, x, w, **law, all_reduce=lambda _: sums)
            for g, x, w in zip(grad_outputs, xs, weights, strict=True)
        ),
        strict=True,
    )
    groups = [_sum(dws[start : start + replicas]) for start in range(0, len(dws), replicas)]
    return [Shard(y, dx, groups[rank // replicas]) for rank, (y, dx) in enumerate(zip(ys, dxs, strict=True))]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """In order, from a zero without axes, whose dtype gives way to that of the tensors."""
    return sum(tensors, torch.zeros(()))


def _reduced(x: Tensor, all_reduce: AllReduce | None) -> Tensor:
    return x if all_reduce is None else all_reduce(x)


def _token_sums(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """This rank's part of S and C for every token: [2, seq, batch]."""
    return torch.stack([x.square().sum(-1), (w * g * x).sum(-1)])


def _scale(normed: Tensor, weight: Tensor, dtype: torch.dtype, rounding: Rounding) -> Tensor:
    if rounding == "twice":
        return weight * normed.to(dtype)
    return (weight.to(normed.dtype) * normed).to(torch.promote_types(dtype, weight.dtype))
