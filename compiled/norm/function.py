"""`HeadNorm`: the norm over all heads of all ranks as one autograd function, with one all-reduce each way.

    S = all_reduce(sum over local heads of x^2) / R       r = (S/N + eps)^(-1/2)      y = w * round(x r)
    C = all_reduce(sum over local heads of w g x)
    dx = r w g - x r^3 C / (N R)                          dw = sum over tokens of g x r, over all replicas

The formulas and their symbols are `reference.norm`'s. Queries and keys are two parts, whose S and C are summed by the
same all-reduce. For the backward pass the function keeps its inputs and r: 4 bytes for each token and part. Where R > 1
ranks hold the same head, each rank's dx is its own share, and dw is summed by the same all-reduce as C.

The five steps between the collectives are computed by `steps_triton` on CUDA and by `steps_torch` elsewhere. Eager
calls on CUDA go to `host`, which has the same function in C++.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compiled.norm import host, steps_torch, steps_triton
from compiled.norm.collectives import ProcessGroupInfo, sum_over_ranks
from compiled.norm.spec import NormSpec
from compiled.tracing import is_traced


class HeadNorm(torch.autograd.Function):
    """`apply(spec, ranks, replicas, cos, sin, *weights, *inputs)`: one weight and one R in `replicas` for each part.

    `steps_torch` describes the inputs, the outputs, cos and sin.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: NormSpec,
        ranks: ProcessGroupInfo,
        replicas: tuple[int, ...],
        cos: Tensor | None,
        sin: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, inputs = list(tensors[: len(replicas)]), list(tensors[len(replicas) :])
        steps = _steps(inputs[0])
        sums = None
        if ranks.size > 1:
            sums = sum_over_ranks(steps.square_sums(inputs, spec), ranks)
        *outputs, rstd = steps.forward(inputs, weights, sums, cos, sin, spec)
        ctx.spec, ctx.ranks, ctx.replicas = spec, ranks, replicas
        ctx.save_for_backward(cos, sin, rstd, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, rstd, *tensors = ctx.saved_tensors
        weights, inputs = tensors[: len(ctx.replicas)], tensors[len(ctx.replicas) :]
        steps = _steps(inputs[0])
        common = (list(grads), inputs, weights, rstd)
        if ctx.ranks.size == 1:
            *dxs, dw = steps.backward(*common, cos, sin, ctx.spec)
            dws = dw.split_with_sizes([w.numel() for w in weights])
        else:
            coupling, dw = steps.backward_sums(*common, cos, sin, ctx.spec)
            dws = dw.split_with_sizes([w.numel() for w in weights])
            coupling, dws = _summed(coupling, dws, ctx.ranks, ctx.replicas)
            dxs = steps.backward_apply(*common, coupling, cos, sin, ctx.spec)
        return None, None, None, None, None, *(dw.to(w.dtype) for dw, w in zip(dws, weights, strict=True)), *dxs


def head_norm(
    spec: NormSpec,
    ranks: ProcessGroupInfo,
    replicas: tuple[int, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> Sequence[Tensor]:
    """`HeadNorm.apply`; in eager mode on a GPU its C++ form, which takes less processor time."""
    if _steps(inputs[0]) is steps_triton and not is_traced(inputs[0]):
        call = host.head_norm(spec, ranks, replicas)
        if call is not None:
            return call(cos, sin, weights, inputs)
    return HeadNorm.apply(spec, ranks, replicas, cos, sin, *weights, *inputs)


def check_channels(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or x.shape[2] * x.shape[3] != len(weight):
        raise ValueError(
            f"x must be [seq, batch, heads, head_dim] with the weight's {len(weight)} channels: found "
            f"{tuple(x.shape)}; give this rank's heads, no others"
        )


def _steps(x: Tensor) -> ModuleType:
    """The module that computes the steps between the collectives."""
    return steps_triton if x.is_cuda and x.dtype != torch.float64 else steps_torch


def _summed(
    coupling: Tensor, dws: Sequence[Tensor], ranks: ProcessGroupInfo, replicas: tuple[int, ...]
) -> tuple[Tensor, Sequence[Tensor]]:
    """C summed over all ranks, and dw over the ranks that hold the same heads, in one all-reduce.

    Ranks that hold the same heads are neighbours. In the buffer each such set has a part of its own, and a rank
    contributes zeros to the parts of the others.
    """
    if max(replicas) == 1:
        return sum_over_ranks(coupling, ranks), dws
    buffer = [coupling.flatten()]
    for dw, r in zip(dws, replicas, strict=True):
        if r > 1:
            before = ranks.rank // r
            buffer.append(F.pad(dw, (before * len(dw), (ranks.size // r - before - 1) * len(dw))))
    total = sum_over_ranks(torch.cat(buffer), ranks)
    sizes = [len(part) for part in buffer]
    summed, *places = total.split(sizes)
    places = iter(places)
    dws = [
        dw if r == 1 else next(places).view(-1, len(dw))[ranks.rank // r] for dw, r in zip(dws, replicas, strict=True)
    ]
    return summed.view(coupling.shape), dws
