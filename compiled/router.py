"""A router's logits, of a float32 weight, at the speed of bfloat16.

**Law.** logits = x weight^T; gradients grad weight, rounded once to bfloat16, and grad^T x; as exact as in float32.

**Why.** As torch has it, x is copied in float32 for the product and again for the weight's gradient, which each write
and read 50 MB for 4096 tokens of width 3072, and float32 products do not use tensor cores. Here x, 25 MB, is read once
in each pass for as many experts as a tile has, and its gradient is written once.

**Exactness.** A float32 number is the sum of three of bfloat16, of 8 bits each, and products of bfloat16 are exact in
float32. x times a float32 number is three products, the smallest first; of two float32 numbers, six of nine are kept,
the others being at most 2^-23 of the whole. Tensor cores cut sums off where float32 rounds: they start from zero for
each block, and blocks are added by the other units. TensorFloat-32 is nowhere. What is divided over programs is written
for each and added afterwards, so that two runs are equal; how it is divided depends on the number of tokens. Where an
argument is infinite, or weight or gradient above bfloat16's largest, results are NaN; below 2^-110, last bits are lost.
"""

# ruff: noqa: N803  (upper case: compile-time constants)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float32
from torch import Tensor

from compiled.triton_launch import Launcher


class Tile(NamedTuple):
    """What a program has at a time: `experts` at most, and how it does that."""

    tokens: int
    columns: int
    experts: int
    warps: int = 4
    stages: int = 3


FORWARD, GRAD_X, GRAD_WEIGHT = Tile(128, 64, 64, 8), Tile(128, 64, 32, 8, 1), Tile(64, 128, 64, 8)
PROGRAMS = 264  # that sums are divided over, if tiles are fewer: two for each multiprocessor of an H200
OPERANDS = tl.bfloat16  # of products


def router_logits(
    x: BFloat16[Tensor, "tokens hidden"], weight: Float32[Tensor, "experts hidden"]
) -> Float32[Tensor, "tokens experts"]:
    """`x.float() @ weight.T`, also its gradients, of both arguments. What autograd keeps is `x` and `weight`.

    Raises:
        ValueError: an argument is of another dtype or shape, or not on a GPU as `x` is; names it, and what was found.
    """
    _check(x, weight)
    return _RouterLogits.apply(x.contiguous(), weight.contiguous())  # pyright: ignore[reportReturnType]


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dtype != torch.bfloat16 or x.dim() != 2:
        raise ValueError(f"x must be [tokens, hidden], {torch.bfloat16}, found {x.dtype} {tuple(x.shape)}")
    if weight.dtype != torch.float32 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be [experts, {x.shape[1]}], {torch.float32}, found {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight must be where x is, on {x.device}, found {weight.device}")


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _logits(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return _grad_x(grad, weight), _grad_weight(grad, x)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    (tokens, hidden), experts = x.shape, len(weight)
    if not tokens:
        return weight.new_empty(0, experts)
    tile, constants = _fitted(FORWARD, experts)
    grid = triton.cdiv(tokens, tile.tokens), triton.cdiv(experts, tile.experts)
    slices = _slices(grid, triton.cdiv(hidden, tile.columns))
    parts = weight.new_empty(slices * tokens, experts)
    arguments = x, weight, parts, experts, hidden
    _forward((*grid, slices), arguments, constants, free=(tokens,), warps=tile.warps, stages=tile.stages)
    return _sum(parts, slices)


def _grad_x(grad: Tensor, weight: Tensor) -> Tensor:
    (tokens, experts), hidden = grad.shape, weight.shape[1]
    grad_x = grad.new_empty(tokens, hidden, dtype=torch.bfloat16)
    if tokens:
        tile, constants = _fitted(GRAD_X, experts)
        grid = triton.cdiv(tokens, tile.tokens), triton.cdiv(hidden, tile.columns), 1
        arguments = grad, weight, grad_x, experts, hidden
        _backward_x(grid, arguments, constants, free=(tokens,), warps=tile.warps, stages=tile.stages)
    return grad_x


def _grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    (tokens, experts), hidden = grad.shape, x.shape[1]
    if not tokens:
        return grad.new_zeros(experts, hidden)
    tile, constants = _fitted(GRAD_WEIGHT, experts)
    grid = triton.cdiv(hidden, tile.columns), triton.cdiv(experts, tile.experts)
    slices = _slices(grid, triton.cdiv(tokens, tile.tokens))
    parts = grad.new_empty(slices * experts, hidden)
    arguments = grad, x, parts, experts, hidden
    _backward_weight((*grid, slices), arguments, constants, free=(tokens,), warps=tile.warps, stages=tile.stages)
    return _sum(parts, slices)


def _fitted(tile: Tile, experts: int) -> tuple[Tile, tuple[Any, ...]]:
    """The tile for so many experts, and the kernels' constants."""
    tile = tile._replace(experts=min(tile.experts, max(16, triton.next_power_of_2(experts))))
    return tile, (tile.tokens, tile.columns, tile.experts, OPERANDS)


def _slices(tiles: tuple[int, int], blocks: int) -> int:
    """How many programs share the sums of a tile, which are of so many blocks."""
    return max(1, min(blocks, PROGRAMS // (tiles[0] * tiles[1])))


def _sum(parts: Tensor, slices: int) -> Tensor:
    """Not a view, which autograd would not let be changed in place."""
    return parts if slices == 1 else parts.view(slices, -1, parts.shape[1]).sum(0)


@triton.jit
def _split(x):
    """Three numbers of bfloat16, whose sum is x."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    x -= middle.to(tl.float32)
    return high, middle, x.to(tl.bfloat16)


@triton.jit
def _dot(a, b, sum, OPERANDS: tl.constexpr):
    """`a @ b + sum`, where Triton must not make one sum of `sum` and that of other blocks, as of `x += tl.dot(a, b)`.

    Its interpreter does not multiply bfloat16: there `OPERANDS` is float32, which changes no product.
    """
    return tl.dot(a.to(OPERANDS), b.to(OPERANDS), sum)


@triton.jit
def _share(length, BLOCK: tl.constexpr):
    """Where a program's slice starts and ends: whole blocks, the last of them cut off at the end of all."""
    size = tl.cdiv(tl.cdiv(length, BLOCK), tl.num_programs(2)) * BLOCK
    start = tl.program_id(2) * size
    return start, tl.minimum(start + size, length)


@Launcher
@triton.jit(do_not_specialize=["tokens"])
def _forward(
    tokens, x, weight, parts, experts, hidden,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """A tile of logits, of a slice of the columns."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    of_tokens, of_experts = (first + token < tokens)[:, None], expert < experts
    x += first * hidden
    sum = tl.zeros((TOKENS, EXPERTS), dtype=tl.float32)
    start, end = _share(hidden, COLUMNS)
    for at in range(start, end, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        inside = (column < hidden)[None, :]
        a = tl.load(x + token[:, None] * hidden + column[None, :], mask=of_tokens & inside, other=0.0)
        w = tl.load(weight + expert[:, None] * hidden + column[None, :], mask=of_experts[:, None] & inside, other=0.0)
        high, middle, low = _split(w)
        block = _dot(a, tl.trans(low), None, OPERANDS)
        block = _dot(a, tl.trans(middle), block, OPERANDS)
        sum += _dot(a, tl.trans(high), block, OPERANDS)
    parts += (tl.program_id(2).to(tl.int64) * tokens + first) * experts
    tl.store(parts + token[:, None] * experts + expert[None, :], sum, mask=of_tokens & of_experts[None, :])


@Launcher
@triton.jit(do_not_specialize=["tokens"])
def _backward_x(
    tokens, grad, weight, grad_x, experts, hidden,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """A tile of x's gradient."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    of_tokens, inside = (first + token < tokens)[:, None], (column < hidden)[None, :]
    grad += first * experts
    sum = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for at in range(0, experts, EXPERTS):
        expert = at + tl.arange(0, EXPERTS)
        of_experts = expert < experts
        g = tl.load(grad + token[:, None] * experts + expert[None, :], mask=of_tokens & of_experts[None, :], other=0.0)
        w = tl.load(weight + expert[:, None] * hidden + column[None, :], mask=of_experts[:, None] & inside, other=0.0)
        high, middle, low = _split(g)
        w_high, w_middle, w_low = _split(w)
        block = _dot(low, w_high, None, OPERANDS)
        block = _dot(middle, w_middle, block, OPERANDS)
        block = _dot(high, w_low, block, OPERANDS)
        block = _dot(middle, w_high, block, OPERANDS)
        block = _dot(high, w_middle, block, OPERANDS)
        sum += _dot(high, w_high, block, OPERANDS)
    tl.store(grad_x + first * hidden + token[:, None] * hidden + column[None, :], sum, mask=of_tokens & inside)


@Launcher
@triton.jit(do_not_specialize=["tokens"])
def _backward_weight(
    tokens, grad, x, parts, experts, hidden,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """A tile of the weight's gradient, transposed, of a slice of the tokens."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    inside, of_experts = column < hidden, (expert < experts)[None, :]
    token = tl.arange(0, TOKENS)
    sum = tl.zeros((COLUMNS, EXPERTS), dtype=tl.float32)
    start, end = _share(tokens, TOKENS)
    grad += start.to(tl.int64) * experts
    x += start.to(tl.int64) * hidden
    for at in range(start, end, TOKENS):
        of_tokens = (at + token < tokens)[:, None]
        g = tl.load(grad + token[:, None] * experts + expert[None, :], mask=of_tokens & of_experts, other=0.0)
        a = tl.load(x + token[:, None] * hidden + column[None, :], mask=of_tokens & inside[None, :], other=0.0)
        grad += TOKENS * experts
        x += TOKENS * hidden
        a = tl.trans(a)
        high, middle, low = _split(g)
        block = _dot(a, low, None, OPERANDS)
        block = _dot(a, middle, block, OPERANDS)
        sum += _dot(a, high, block, OPERANDS)
    parts += tl.program_id(2).to(tl.int64) * experts * hidden
    tl.store(parts + expert[None, :] * hidden + column[:, None], sum, mask=inside[:, None] & of_experts)
