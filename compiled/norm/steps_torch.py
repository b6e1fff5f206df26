"""The steps of `HeadNorm` between its collectives, in plain torch: for CPUs, and for float64.

Five functions. `steps_triton` has the same ones, with the same arguments, as Triton kernels; `HeadNorm` puts the
collectives between them. S, C, r and R are those of `reference.norm`. Sums over a token's heads are `[parts, seq,
batch]`, where the parts are the queries and, if given, the keys. The weights' gradients are one vector, all parts in
order.

`inputs` is one tensor a part, `[seq, batch, heads, head_dim]`, or the fused qkv alone: `NormSpec.split` says which.
`cos` and `sin`, `[seq, half]` or `[seq, batch, half]`, rotate the outputs (`reference.rope`); None: no RoPE.
"""

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from compiled.norm.spec import NormSpec, parts_of


def square_sums(inputs: list[Tensor], spec: NormSpec) -> Tensor:
    """This rank's part of S R."""
    parts = parts_of(inputs, spec)[: len(spec.terms)]
    return torch.stack([_wide(x).square().sum((-2, -1)) for x in parts])


def forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    sums: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    spec: NormSpec,
) -> list[Tensor]:
    """y of each part, `[seq, batch, heads, head_dim]`; then, of a fused qkv, a copy of the value; last, r.

    `sums` is S R, over all ranks; None means that this rank has all heads.
    """
    if sums is None:
        sums = square_sums(inputs, spec)
    rstd = torch.stack([torch.rsqrt(s / n + spec.eps) for s, n in zip(sums, spec.terms, strict=True)])
    *normed, passed = parts = parts_of(inputs, spec)
    if not spec.split:
        normed, passed = parts, None
    outputs = []
    for x, w, r in zip(normed, weights, rstd, strict=True):
        y = w.view(x.shape[2:]) * (_wide(x) * r[..., None, None]).to(x.dtype)
        # Not a view: autograd would not let the caller change it in place.
        y = torch.ops.aten._unsafe_view(y.contiguous(), _by_head(x, spec))
        if cos is not None:
            y = _rotate(y, cos, sin)  # pyright: ignore[reportArgumentType]  # given with cos
        outputs.append(y)
    if passed is not None:
        value = passed.reshape(_by_head(passed, spec))
        outputs.append(value.to(outputs[0].dtype, copy=True, memory_format=torch.contiguous_format))
    return [*outputs, rstd]


def backward(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    spec: NormSpec,
) -> list[Tensor]:
    """dx of each of `inputs`; last, dw. For a rank that has all heads."""
    coupling, dw = backward_sums(grads, inputs, weights, rstd, cos, sin, spec)
    dxs = backward_apply(grads, inputs, weights, rstd, coupling, cos, sin, spec)
    return [*dxs, dw.to(weights[0].dtype)]


def backward_sums(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    spec: NormSpec,
) -> list[Tensor]:
    """This rank's part of C, and its dw in float32 or wider."""
    products, dws = [], []
    for x, w, g, r in zip(parts_of(inputs, spec), weights, _rotated_back(grads, cos, sin), rstd, strict=False):
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
    spec: NormSpec,
) -> list[Tensor]:
    """dx of each of `inputs`; `coupling` is C, over all ranks."""
    parts = parts_of(inputs, spec)
    dxs = []
    per_part = zip(parts, weights, _rotated_back(grads, cos, sin), rstd, coupling, spec.terms, strict=False)
    for x, w, g, r, c, n in per_part:
        coefficient = (r.square() * c / n)[..., None, None]
        dx = r[..., None, None] * (_wide(w).view(x.shape[2:]) * g.reshape(x.shape) - coefficient * _wide(x))
        dxs.append(dx.to(x.dtype))
    if not spec.split:
        return dxs
    (qkv,), (first, heads), dim = inputs, spec.split, spec.head_dim
    others = (first * dim, qkv.shape[-1] - (first + heads + 2) * dim)
    return [torch.cat([F.pad(dxs[0], others), dxs[1], grads[2].reshape(parts[2].shape).to(qkv.dtype)], -1)]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_head(x: Tensor, spec: NormSpec) -> tuple[int, ...]:
    return *x.shape[:2], prod(x.shape[2:]) // spec.head_dim, spec.head_dim


def _rotated_back(grads: list[Tensor], cos: Tensor | None, sin: Tensor | None) -> list[Tensor]:
    """The gradients with respect to RoPE's inputs: a rotation's transpose rotates by the opposite angle."""
    wide = [_wide(g) for g in grads]
    if cos is None:
        return wide
    return [_rotate(g, cos, -sin) for g in wide]  # pyright: ignore[reportOptionalOperand]  # given with cos


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Always a new tensor: torch 2.11 loses the gradient of an output that a traced function has under two names."""
    half = cos.shape[-1]
    c, s = (_wide(t).unsqueeze(-2) for t in (cos, sin))
    if cos.dim() == 2:
        c, s = c.unsqueeze(1), s.unsqueeze(1)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    a, b = _wide(a), _wide(b)
    return torch.cat([(a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), rest], -1)
