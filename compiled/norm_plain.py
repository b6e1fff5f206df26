"""The norms of all query heads together and of all key heads together, in plain torch: for CPUs, and for float64.

Five steps, which `norm_ops` offers too, with Triton kernels, under the same names and with the same arguments; the
caller puts the collective between them. S, C, r and R: `reference.norm`. The tokens' sums are `[parts, seq, batch]`,
where the parts are the queries and, if there are any, the keys; gradients of weights are one vector, part after part.

`inputs` is one tensor a part, `[seq, batch, heads, head_dim]`, or the fused qkv alone: `Setting.split` says which.
`cos` and `sin`, `[seq, half]` or `[seq, batch, half]`, turn the outputs (`reference.rope`); with None nothing turns.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Setting(NamedTuple):
    """What does not change from call to call."""

    terms: tuple[int, ...]
    """For each part N R, the number of terms in S: all heads x head_dim, counted as often as ranks hold them."""
    eps: float
    head_dim: int
    split: tuple[int, ...]
    """Of a fused qkv, which query heads of each group are this rank's: first, how many. () for one tensor a part."""


def parts_of(inputs: list[Tensor], setting: Setting) -> list[Tensor]:
    """Views `[seq, batch, groups, heads of a group * head_dim]`: query, key if any; of a fused qkv also the value."""
    if not setting.split:
        return inputs
    (qkv,), (first, heads), dim = inputs, setting.split, setting.head_dim
    others = qkv.shape[-1] - (first + heads + 2) * dim
    _, query, _, key, value = qkv.split_with_sizes([first * dim, heads * dim, others, dim, dim], -1)
    return [query, key, value]


def square_sums(inputs: list[Tensor], setting: Setting) -> Tensor:
    """This rank's part of S R."""
    parts = parts_of(inputs, setting)[: len(setting.terms)]
    return torch.stack([_wide(x).square().sum((-2, -1)) for x in parts])


def forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    sums: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    setting: Setting,
) -> list[Tensor]:
    """y of each part, `[seq, batch, heads, head_dim]` (and of a fused qkv a copy of the value), and at the end r.

    `sums` is S R, over all ranks; None means that this rank has all heads.
    """
    if sums is None:
        sums = square_sums(inputs, setting)
    rstd = torch.stack([torch.rsqrt(s / n + setting.eps) for s, n in zip(sums, setting.terms, strict=True)])
    *normed, passed = parts = parts_of(inputs, setting)
    if not setting.split:
        normed, passed = parts, None
    outputs = []
    for x, w, r in zip(normed, weights, rstd, strict=True):
        y = w.view(x.shape[2:]) * (_wide(x) * r[..., None, None]).to(x.dtype)
        # No view: autograd would not let a caller change it in place.
        y = torch.ops.aten._unsafe_view(y.contiguous(), _by_head(x, setting))
        outputs.append(y if cos is None else _turn(y, cos, sin))
    if passed is not None:
        value = passed.reshape(_by_head(passed, setting))
        outputs.append(value.to(outputs[0].dtype, copy=True, memory_format=torch.contiguous_format))
    return [*outputs, rstd]


def backward(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    setting: Setting,
) -> list[Tensor]:
    """dx of each of `inputs`, and at the end dw: where this rank has all heads."""
    coupling, dw = backward_sums(grads, inputs, weights, rstd, cos, sin, setting)
    dxs = backward_apply(grads, inputs, weights, rstd, coupling, cos, sin, setting)
    return [*dxs, dw.to(weights[0].dtype)]


def backward_sums(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    setting: Setting,
) -> list[Tensor]:
    """This rank's part of C; and this rank's dw, not rounded."""
    products, dws = [], []
    for x, w, g, r in zip(parts_of(inputs, setting), weights, _turned_back(grads, cos, sin), rstd, strict=False):
        gx = g.reshape(x.shape) * _wide(x)
        products.append((gx * _wide(w).view(x.shape[2:])).sum((-2, -1)))
        dws.append((gx * r[..., None, None]).sum((0, 1)).flatten())
    return [torch.stack(products), torch.cat(dws)]


def backward_apply(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    coupling: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    setting: Setting,
) -> list[Tensor]:
    """dx of each of `inputs`; `coupling` is C, over all ranks."""
    parts = parts_of(inputs, setting)
    dxs = []
    per_part = zip(parts, weights, _turned_back(grads, cos, sin), rstd, coupling, setting.terms, strict=False)
    for x, w, g, r, c, n in per_part:
        coefficient = (r.square() * c / n)[..., None, None]
        dx = r[..., None, None] * (_wide(w).view(x.shape[2:]) * g.reshape(x.shape) - coefficient * _wide(x))
        dxs.append(dx.to(x.dtype))
    if not setting.split:
        return dxs
    (qkv,), (first, heads), dim = inputs, setting.split, setting.head_dim
    others = (first * dim, qkv.shape[-1] - (first + heads + 2) * dim)
    return [torch.cat([F.pad(dxs[0], others), dxs[1], grads[2].reshape(parts[2].shape).to(qkv.dtype)], -1)]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_head(x: Tensor, setting: Setting) -> tuple[int, ...]:
    return *x.shape[:2], prod(x.shape[2:]) // setting.head_dim, setting.head_dim


def _turned_back(grads: list[Tensor], cos: Tensor | None, sin: Tensor | None) -> list[Tensor]:
    """The gradients before RoPE: the turn's transpose is the turn by the opposite angle."""
    wide = [_wide(g) for g in grads]
    return wide if cos is None else [_turn(g, cos, -sin) for g in wide]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A new tensor always: torch 2.11 loses the gradient of an output that a traced function has under two names."""
    half = cos.shape[-1]
    c, s = (_wide(t).unsqueeze(-2) for t in (cos, sin))
    if cos.dim() == 2:
        c, s = c.unsqueeze(1), s.unsqueeze(1)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    a, b = _wide(a), _wide(b)
    return torch.cat([(a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), rest], -1)
