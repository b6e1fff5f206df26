"""Mistakes planted into `transformers`' MiniMax-M2, each written anew from what the mistake is.

`PLANTS` has one for each row of `reference.laws.WRONG_LAWS`, by its name. Nothing here uses the reference's functions:
norms are torch's `rms_norm`, rotations are products of complex numbers, what goes wrong over tensor-parallel ranks is
written as the formula of the gradient that results.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.minimax_m2 import modeling_minimax_m2 as hf

from support.oracles import Case

# 6 query heads to 2 key heads, hidden / heads is not head_dim, width is off the grid of FP8 blocks (of 32).
CASE = Case(heads=6, groups=2, head_dim=16, rotary=8, hidden=72, width=40, experts=5, top_k=3, vocab=41)
BLOCK = 32
EPS = 1e-6
PER_GROUP, QUERIES, KEYS = CASE.heads // CASE.groups, CASE.heads * CASE.head_dim, CASE.groups * CASE.head_dim

Gradients = dict[str, Tensor]
Names = dict[str, Tensor]


class Plant(NamedTuple):
    """One mistake: in the weights that are loaded, in the model, in its gradients after the backward pass.

    `ranks` is the tensor-parallel size at which it is to be found. `model` may return a dictionary that the backward
    pass fills with gradients, which take the place of autograd's.
    """

    model: Callable[[nn.Module, pytest.MonkeyPatch], Gradients | None] = lambda model, patch: None
    weights: Callable[[Names], Names] = lambda weights: weights
    gradients: Callable[[Gradients], Gradients] = lambda gradients: gradients
    ranks: int = 2


# ------------------------------------------------------------------------------------------------------------- norms


def norms(model: nn.Module, *kinds: str) -> dict[str, nn.Module]:
    """The norms of some kinds, by the names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules() if name.split(".")[-1] in kinds}


QK, HIDDEN = ("q_norm", "k_norm"), ("input_layernorm", "post_attention_layernorm", "norm")


def norm_as(kinds: tuple[str, ...], forward: Callable[[nn.Module, Tensor], Tensor]) -> Plant:
    def plant(model, patch):
        for module in norms(model, *kinds).values():
            module.forward = partial(forward, module)

    return Plant(plant)


def over_each_head(module, x):
    heads = x.unflatten(-1, (-1, CASE.head_dim))
    return F.rms_norm(heads, (CASE.head_dim,), eps=EPS).flatten(-2) * module.weight


def plus_one(module, x):
    return F.rms_norm(x, (x.shape[-1],), 1 + module.weight, EPS)


def eps_outside(module, x):
    return module.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + EPS)


def with_eps(eps):
    return lambda module, x: F.rms_norm(x, (x.shape[-1],), module.weight, eps)


def over_each_half(module, x):
    half = x.shape[-1] // 2
    return torch.cat([F.rms_norm(part, (half,), eps=EPS) for part in x.chunk(2, -1)], -1) * module.weight


class LocalBackward(torch.autograd.Function):
    """The norm over all heads, whose backward pass sums C over each half of the channels by itself."""

    @staticmethod
    def forward(ctx, x, weight):
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        ctx.save_for_backward(x, weight, r)
        return x * r * weight

    @staticmethod
    def backward(ctx, g):
        x, weight, r = ctx.saved_tensors
        coupling = (
            (weight * g * x).unflatten(-1, (2, -1)).sum(-1, keepdim=True).expand(*x.shape[:-1], 2, x.shape[-1] // 2)
        )
        dx = r * weight * g - x * r**3 * coupling.flatten(-2) / x.shape[-1]
        return dx, (g * x * r).sum((0, 1))


def exchange_norm_weights(model, patch):
    for attention in attentions(model):
        q, k = attention.q_norm, attention.k_norm

        def joined(q=q, k=k):
            return torch.cat([q.weight, k.weight])

        q.forward = lambda x, joined=joined: F.rms_norm(x, (QUERIES,), joined()[KEYS:], EPS)
        k.forward = lambda x, joined=joined: F.rms_norm(x, (KEYS,), joined()[:KEYS], EPS)


def norm_after_rope(model, patch):
    running, rotate = [], hf.apply_rotary_pos_emb
    for attention in attentions(model):
        attention.q_norm.forward = attention.k_norm.forward = lambda x: x
        attention.register_forward_pre_hook(lambda module, args: running.append(module))

    def norm(x, weight):
        flat = x.transpose(1, 2)
        return F.rms_norm(flat.flatten(2), weight.shape, weight, EPS).view(flat.shape).transpose(1, 2)

    def rotated(q, k, cos, sin):
        q, k = rotate(q, k, cos, sin)
        return norm(q, running[-1].q_norm.weight), norm(k, running[-1].k_norm.weight)

    patch.setattr(hf, "apply_rotary_pos_emb", rotated)


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def each_gradient(*endings: str, change: Callable[[Tensor], Tensor]) -> Callable[[Gradients], Gradients]:
    return lambda gradients: {name: change(g) if name.endswith(endings) else g for name, g in gradients.items()}


def norm_gradients_of_first_tokens(model, patch):
    """y = x_normed * w, and dw only over the first half of each sequence."""
    found = {}
    for name, module in norms(model, *HIDDEN).items():

        def forward(x, name=name, module=module):
            normed = F.rms_norm(x, (x.shape[-1],), eps=EPS)
            y = normed * module.weight.detach()
            half = x.shape[1] // 2
            y.register_hook(lambda g: found.update({name: (g * normed).detach()[:, :half].sum((0, 1))}))
            return y

        module.forward = forward
    return found


def router_gradients_of_first_tokens(model, patch):
    found = {}
    for i, layer in enumerate(model.model.layers):

        def forward(x, bias, gate=layer.mlp.gate, name=f"model.layers.{i}.mlp.gate.weight"):
            logits = x @ gate.weight.detach().T
            first = torch.zeros(2, len(x) // 2, 1, dtype=x.dtype)  # 2 sequences, of which the first half counts
            first[:, : len(x) // 4] = 1
            logits.register_hook(lambda g: found.update({name: (g * first.flatten(0, 1)).T @ x.detach()}))
            return choose(logits, logits.sigmoid(), bias, gate.top_k)

        layer.mlp.gate.forward = forward
    return found


def key_gradients_of_first_replica(model, patch):
    """Six ranks of one query head: dw of the key norm from query heads 0 and 3 only."""
    found, attend = {}, hf.eager_attention_forward
    normed = {}
    for i, attention in enumerate(attentions(model)):
        attention.num_key_value_groups = 1

        def forward(x, i=i, norm=attention.k_norm):
            normed[i] = F.rms_norm(x, (KEYS,), eps=EPS)
            return normed[i] * norm.weight.detach()

        attention.k_norm.forward = forward

    def repeated(module, query, key, value, mask, **kwargs):
        key, value = (x.repeat_interleave(PER_GROUP, 1) for x in (key, value))
        i = module.layer_idx
        name, x = f"model.layers.{i}.self_attn.k_norm.weight", normed[i].detach()

        def keep(g):
            back = rotation(direction=-1)(g[:, ::PER_GROUP]).transpose(1, 2).flatten(2)
            found[name] = (back * x).sum((0, 1))

        key.register_hook(keep)
        return attend(module, query, key, value, mask, **kwargs)

    patch.setattr(hf, "eager_attention_forward", repeated)
    return found


# ---------------------------------------------------------------------------------------------- rotation, attention


def rotation(
    *, channels=CASE.rotary, exponent=None, theta=5e6, pairs="halves", start=0, direction=1
) -> Callable[[Tensor], Tensor]:
    """[batch, heads, seq, head_dim], some channels turned as complex numbers."""

    def turn(x: Tensor) -> Tensor:
        part = x[..., start : start + channels]
        real, imaginary = (part[..., ::2], part[..., 1::2]) if pairs == "neighbours" else part.chunk(2, -1)
        steps = theta ** (-2 * torch.arange(channels // 2, dtype=x.dtype) / (exponent or channels))
        angle = direction * torch.arange(x.shape[2], dtype=x.dtype)[:, None] * steps
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
        both = (turned.real, turned.imag)
        joined = torch.stack(both, -1).flatten(-2) if pairs == "neighbours" else torch.cat(both, -1)
        return torch.cat([x[..., :start], joined, x[..., start + channels :]], -1)

    return turn


def rotate_as(**kwargs) -> Plant:
    turn = rotation(**kwargs)
    return Plant(lambda model, patch: patch.setattr(hf, "apply_rotary_pos_emb", lambda q, k, *_: (turn(q), turn(k))))


def scale_by(factor: float) -> Plant:
    def plant(model, patch):
        for attention in attentions(model):
            attention.scaling = factor

    return Plant(plant)


def without_mask(model, patch):
    attend = hf.eager_attention_forward
    patch.setattr(
        hf, "eager_attention_forward", lambda module, q, k, v, mask, **kwargs: attend(module, q, k, v, None, **kwargs)
    )


# ------------------------------------------------------------------------------------------------- router and experts


def choose(logits, scores, bias, top_k, *, biased_weights=False, normalise=True):
    index = (scores + bias).topk(top_k, -1).indices
    weights = (scores + bias if biased_weights else scores).gather(-1, index)
    return logits, weights / weights.sum(-1, keepdim=True) if normalise else weights, index


def route_as(score=torch.sigmoid, bias_factor=1.0, dtype=torch.float64, fewer=0, **kwargs) -> Plant:
    def forward(self, x, bias):
        logits = F.linear(x.to(dtype), self.weight.to(dtype)).to(x.dtype)
        return choose(logits, score(logits), bias * bias_factor, self.top_k - fewer, **kwargs)

    return Plant(lambda model, patch: patch.setattr(hf.MiniMaxM2TopKRouter, "forward", forward))


def gelu(model, patch):
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.GELU()


# --------------------------------------------------------------------------------------------------- layouts of weights


def by_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query heads, key head, value head of each group."""
    d, rows = CASE.head_dim, []
    for g in range(CASE.groups):
        rows += [q[g * PER_GROUP * d : (g + 1) * PER_GROUP * d], k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
    return torch.cat(rows)


def read_as_blocks(model, patch):
    for a in attentions(model):
        for name, start, size in (("q", 0, QUERIES), ("k", QUERIES, KEYS), ("v", QUERIES + KEYS, KEYS)):
            projection = getattr(a, f"{name}_proj")

            def forward(x, a=a, start=start, size=size):
                fused = by_group(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)
                return F.linear(x, fused[start : start + size])

            projection.forward = forward


def stored_as_blocks(weights: Names) -> Names:
    changed, d = dict(weights), CASE.head_dim
    for i in range(CASE.layers):
        q, k, v = names = [f"model.layers.{i}.self_attn.{part}_proj.weight" for part in "qkv"]
        heads = torch.cat([weights[name] for name in names]).split(d)
        groups = [heads[g * (PER_GROUP + 2) : (g + 1) * (PER_GROUP + 2)] for g in range(CASE.groups)]
        changed[q] = torch.cat([head for group in groups for head in group[:PER_GROUP]])
        changed[k] = torch.cat([group[PER_GROUP] for group in groups])
        changed[v] = torch.cat([group[PER_GROUP + 1] for group in groups])
    return changed


def exchange(*parts: str) -> Callable[[Names], Names]:
    """Two kinds of weights, or their gradients, under each other's names."""

    def other(name: str) -> str:
        for part, its in (parts, parts[::-1]):
            if name.endswith(f"{part}.weight"):
                return name.removesuffix(f"{part}.weight") + f"{its}.weight"
        return name

    return lambda named: {name: named[other(name)] for name in named}


def experts(weights: Names) -> list[tuple[str, str, str]]:
    stems = [name.removesuffix("w1.weight") for name in weights if name.endswith("w1.weight")]
    return [(stem + "w1.weight", stem + "w3.weight", stem + "w2.weight") for stem in stems]


def halves_exchanged(weights: Names) -> Names:
    left, right = slice(0, CASE.width // 2), slice(CASE.width // 2, None)
    return weights | {w2: torch.cat([weights[w2][:, right], weights[w2][:, left]], 1) for _, _, w2 in experts(weights)}


def cut_in_one_run(weights: Names) -> Names:
    """Rank 0 holds w1 and takes its halves for gate and up, rank 1 holds w3."""
    changed, half = dict(weights), CASE.width // 2
    for w1, w3, _ in experts(weights):
        changed[w1] = torch.cat([weights[w1][:half], weights[w3][:half]])
        changed[w3] = torch.cat([weights[w1][half:], weights[w3][half:]])
    return changed


FP8_WEIGHTS = tuple(f"{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"))


def quantized(weights: Names) -> tuple[Names, Names, Names]:
    """The weights as FP8 gives them, their scales, and the weights that scales rounded to bfloat16 give."""
    exact, scales, rounded = dict(weights), {}, dict(weights)
    for name, value in weights.items():
        if name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "w1.weight", "w2.weight", "w3.weight")
        ):
            rows, cols = (-(-size // BLOCK) for size in value.shape)
            scale = torch.empty(rows, cols, dtype=torch.float32)
            for i in range(rows):
                for j in range(cols):
                    block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
                    scale[i, j] = value[block].abs().max() / 448
                    codes = (value[block].float() / scale[i, j]).to(torch.float8_e4m3fn).double()
                    exact[name], rounded[name] = (w.clone() if w is value else w for w in (exact[name], rounded[name]))
                    exact[name][block] = codes * scale[i, j].double()
                    rounded[name][block] = codes * scale[i, j].bfloat16().double()
            scales[f"{name}_scale_inv"] = scale
    return exact, scales, rounded


def bfloat16_scales(weights: Names) -> Names:
    """The quantised weights' own scales are found again: the largest code of a block is 448."""
    return quantized(weights)[2]


# --------------------------------------------------------------------------------------------------------------- table

NORM_WEIGHTS = ("q_norm.weight", "k_norm.weight")
local_backward = norm_as(QK, lambda module, x: LocalBackward.apply(x, module.weight))
summed = each_gradient(*NORM_WEIGHTS, change=lambda g: (g.chunk(2)[0] + g.chunk(2)[1]).repeat(2))

PLANTS: dict[str, Plant] = {
    "norm over each head": norm_as(QK, over_each_head),
    "query norm over each head": norm_as(("q_norm",), over_each_head),
    "key norm over each head": norm_as(("k_norm",), over_each_head),
    "no norm of queries and keys": norm_as(QK, lambda module, x: x),
    "no query norm": norm_as(("q_norm",), lambda module, x: x),
    "no key norm": norm_as(("k_norm",), lambda module, x: x),
    "norm after RoPE": Plant(norm_after_rope),
    "query and key norm weights exchanged": Plant(exchange_norm_weights, ranks=1),
    "query/key norm weight + 1": norm_as(QK, plus_one),
    "query/key norm eps outside the root": norm_as(QK, eps_outside),
    "query/key norm eps 1e-5": norm_as(QK, with_eps(1e-5)),
    "query/key norm eps 1e-8": norm_as(QK, with_eps(1e-8)),
    "root mean square of each rank's heads": norm_as(QK, over_each_half),
    "backward sum missing": local_backward,
    "norm weight gradients summed over different heads": Plant(gradients=summed),
    "norm weight gradients times tensor-parallel size": Plant(
        gradients=each_gradient(*NORM_WEIGHTS, change=lambda g: 2 * g)
    ),
    "key replicas' gradients not summed": Plant(key_gradients_of_first_replica, ranks=6),
    "key replicas' gradients averaged": Plant(
        gradients=each_gradient("k_norm.weight", change=lambda g: g / 3), ranks=6
    ),
    "layer norm gradients of one rank's tokens": Plant(norm_gradients_of_first_tokens),
    "router gradient of one rank's tokens": Plant(router_gradients_of_first_tokens),
    "all channels rotated": rotate_as(channels=CASE.head_dim),
    "no RoPE": rotate_as(direction=0),
    "last channels rotated": rotate_as(start=CASE.head_dim - CASE.rotary),
    "interleaved RoPE": rotate_as(pairs="neighbours"),
    "RoPE frequencies over head_dim": rotate_as(exponent=CASE.head_dim),
    "RoPE theta 10000": rotate_as(theta=1e4),
    "RoPE theta 1000000": rotate_as(theta=1e6),
    "attention scaled by hidden / heads": scale_by((CASE.hidden / CASE.heads) ** -0.5),
    "attention not scaled": scale_by(1.0),
    "key heads tiled": Plant(
        lambda model, patch: patch.setattr(hf, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1)), ranks=1
    ),
    "not causal": Plant(without_mask),
    "bias in the weights": route_as(biased_weights=True),
    "bias ignored": route_as(bias_factor=0.0),
    "weights not normalised": route_as(normalise=False),
    "softmax scores": route_as(score=partial(torch.softmax, dim=-1)),
    "softmax scores, bias ignored": route_as(score=partial(torch.softmax, dim=-1), bias_factor=0.0),
    "router in bfloat16": route_as(dtype=torch.bfloat16),
    "one expert too few": route_as(fewer=1),
    "layer norm weight + 1": norm_as(HIDDEN, plus_one),
    "all norm weights + 1": norm_as(HIDDEN + QK, plus_one),
    "layer norm eps outside the root": norm_as(HIDDEN, eps_outside),
    "layer norm eps 1e-5": norm_as(HIDDEN, with_eps(1e-5)),
    "layer norm eps 1e-8": norm_as(HIDDEN, with_eps(1e-8)),
    "all norms' eps outside the root": norm_as(HIDDEN + QK, eps_outside),
    "all norms' eps 1e-5": norm_as(HIDDEN + QK, with_eps(1e-5)),
    "all norms' eps 1e-8": norm_as(HIDDEN + QK, with_eps(1e-8)),
    "gelu experts": Plant(gelu),
    "qkv read as blocks": Plant(read_as_blocks, ranks=1),
    "qkv stored as blocks": Plant(weights=stored_as_blocks),
    "keys and values exchanged": Plant(weights=exchange("k_proj", "v_proj"), gradients=exchange("k_proj", "v_proj")),
    "gate and up exchanged": Plant(weights=exchange("w1", "w3"), gradients=exchange("w1", "w3")),
    "expert halves exchanged": Plant(weights=halves_exchanged),
    "gate and up cut in one run": Plant(weights=cut_in_one_run),
    "FP8 scales in bfloat16": Plant(weights=bfloat16_scales),
}
