"""SwiGLU of experts, and the weights that the router gave their tokens.

**Law.** y = w silu(a) b, of each token: a and b are the halves of its row, w is its weight; in float32, rounded once.

**Why.** Compiled by torch, as megatron-core has it, the backward pass is two kernels that both read rows and gradients,
24 KB a token of width 1536. Here one kernel reads and writes each once: 15 KB.
"""

# ruff: noqa: N803  (upper case: compile-time constants)

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Float16
from torch import Tensor

from compiled.triton_launch import Launcher

BLOCK, WARPS = 512, 4  # elements of a row at a time
_HALF = (torch.bfloat16, torch.float16)


def weighted_swiglu(
    x: BFloat16[Tensor, "tokens gate_and_up"] | Float16[Tensor, "tokens gate_and_up"],
    weights: Float[Tensor, "tokens 1"],
) -> BFloat16[Tensor, "tokens width"] | Float16[Tensor, "tokens width"]:
    """`weights * silu(a) * b`, of the halves `a, b = x.chunk(2, -1)`; also its gradients, of both arguments.

    `weights` are float32 or narrower. What autograd keeps is `x` and `weights`.

    Raises:
        ValueError: an argument is of another dtype or shape, or not on a GPU as `x` is; names it, and what was found.
    """
    _check(x, weights)
    return _WeightedSwiGLU.apply(x.contiguous(), weights.contiguous())  # pyright: ignore[reportReturnType]


def _check(x: Tensor, weights: Tensor) -> None:
    if x.dtype not in _HALF or x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(
            f"x must be [tokens, 2 * width], {' or '.join(map(str, _HALF))}, found {x.dtype} {tuple(x.shape)}"
        )
    if weights.shape != (len(x), 1) or weights.dtype not in (*_HALF, torch.float32):
        raise ValueError(
            f"weights must be {(len(x), 1)}, float32 or narrower, found {weights.dtype} {tuple(weights.shape)}"
        )
    if weights.device != x.device:
        raise ValueError(f"weights must be where x is, on {x.device}, found {weights.device}")


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        out = x.new_empty(len(x), x.shape[1] // 2)
        if len(x):
            _forward((len(x), 1, 1), (x, weights, out, out.shape[1]), (BLOCK,), warps=WARPS)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weights = ctx.saved_tensors
        grad_x, grad_weights = torch.empty_like(x), torch.empty_like(weights)
        if len(x):
            arguments = grad.contiguous(), x, weights, grad_x, grad_weights, grad.shape[1]
            _backward((len(x), 1, 1), arguments, (BLOCK,), warps=WARPS)
        return grad_x, grad_weights


@Launcher
@triton.jit
def _forward(x, weights, out, width, BLOCK: tl.constexpr):
    """A row."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    x += row * 2 * width
    for first in range(0, width, BLOCK):
        i = first + tl.arange(0, BLOCK)
        here = i < width
        a = tl.load(x + i, mask=here, other=0.0).to(tl.float32)
        b = tl.load(x + width + i, mask=here, other=0.0).to(tl.float32)
        tl.store(out + row * width + i, a * tl.sigmoid(a) * b * weight, mask=here)


@Launcher
@triton.jit
def _backward(grad, x, weights, grad_x, grad_weights, width, BLOCK: tl.constexpr):
    """A row: silu'(a) = s (1 + a (1 - s)), s = sigmoid(a)."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    x += row * 2 * width
    grad_x += row * 2 * width
    of_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        i = first + tl.arange(0, BLOCK)
        here = i < width
        g = tl.load(grad + row * width + i, mask=here, other=0.0).to(tl.float32)
        a = tl.load(x + i, mask=here, other=0.0).to(tl.float32)
        b = tl.load(x + width + i, mask=here, other=0.0).to(tl.float32)
        s = tl.sigmoid(a)
        of_weight += g * a * s * b
        g *= weight
        tl.store(grad_x + i, g * b * s * (1 + a * (1 - s)), mask=here)
        tl.store(grad_x + width + i, g * a * s, mask=here)
    tl.store(grad_weights + row, tl.sum(of_weight))
