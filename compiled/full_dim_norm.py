"""RMSNorm over all heads of a token at once, with the heads spread over tensor-parallel ranks: outputs and gradients.

    S = all_reduce(sum over local heads of x^2) / R       r = (S/N + eps)^(-1/2)      y = w * round(x r)
    C = all_reduce(sum over local heads of w g x)
    dx = r w g - x r^3 C / (N R)                          dw = sum over tokens of g x r, over all replicas

One autograd function has the whole law (`reference.norm`), and one all-reduce each way, of S and of C for all parts
(the queries; the keys too). It keeps its inputs for the backward pass, and r: 4 bytes a token and part. With R > 1 each
replica's dx is its share, and dw travels with C, so that it too is complete when the one all-reduce is.

How the five steps between the collectives are computed: `norm_ops` on CUDA, `norm_plain` elsewhere. Eager calls on CUDA
go to `norm_host`, which has the same function in C++.

Under `torch.compile`, `fullgraph=True`, all sequence lengths together take at most two compilations.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from compiled import norm_host, norm_ops, norm_plain
from compiled.collectives import GroupGetter, Ranks, ranks_of, sum_over_ranks
from compiled.norm_plain import Setting
from compiled.sharded_state import sharded_weights


class HeadNorm(torch.autograd.Function):
    """The law above: `apply(setting, ranks, replicas, cos, sin, *weights, *inputs)`, a weight and an R for each part.

    `norm_plain` says what the inputs, the outputs and cos and sin are.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        setting: Setting,
        ranks: Ranks,
        replicas: tuple[int, ...],
        cos: Tensor | None,
        sin: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, inputs = list(tensors[: len(replicas)]), list(tensors[len(replicas) :])
        steps = _steps(inputs[0])
        sums = None
        if ranks.size > 1:
            sums = sum_over_ranks(steps.square_sums(inputs, setting), ranks)
        *outputs, rstd = steps.forward(inputs, weights, sums, cos, sin, setting)
        ctx.setting, ctx.ranks, ctx.replicas = setting, ranks, replicas
        ctx.save_for_backward(cos, sin, rstd, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, rstd, *tensors = ctx.saved_tensors
        weights, inputs = tensors[: len(ctx.replicas)], tensors[len(ctx.replicas) :]
        steps = _steps(inputs[0])
        common = (list(grads), inputs, weights, rstd)
        if ctx.ranks.size == 1:
            *dxs, dw = steps.backward(*common, cos, sin, ctx.setting)
            dws = dw.split_with_sizes([w.numel() for w in weights])
        else:
            coupling, dw = steps.backward_sums(*common, cos, sin, ctx.setting)
            dws = dw.split_with_sizes([w.numel() for w in weights])
            coupling, dws = _summed(coupling, dws, ctx.ranks, ctx.replicas)
            dxs = steps.backward_apply(*common, coupling, cos, sin, ctx.setting)
        return None, None, None, None, None, *(dw.to(w.dtype) for dw, w in zip(dws, weights, strict=True)), *dxs


def head_norm(
    setting: Setting,
    ranks: Ranks,
    replicas: tuple[int, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    weights: list[Tensor],
    inputs: list[Tensor],
) -> Sequence[Tensor]:
    """`HeadNorm`, by the cheapest way to call it: in eager mode on a GPU that is C++."""
    if not torch.compiler.is_compiling() and _steps(inputs[0]) is norm_ops:
        call = norm_host.head_norm(setting, ranks, replicas)
        if call is not None:
            return call(cos, sin, weights, inputs)
    return HeadNorm.apply(setting, ranks, replicas, cos, sin, *weights, *inputs)


def check_channels(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or x.shape[2] * x.shape[3] != len(weight):
        raise ValueError(
            f"x must be [seq, batch, heads, head_dim] with the weight's {len(weight)} channels: found "
            f"{tuple(x.shape)}; give this rank's heads, no others"
        )


def _check(name: str, x: Tensor, *last: int) -> None:
    if x.dim() != 4 or x.shape[2:] != last:
        expected = ", ".join(map(str, last))
        raise ValueError(
            f"{name} must be [seq, batch, {expected}]: found {tuple(x.shape)}; give this rank's heads, no others"
        )


def _steps(x: Tensor) -> ModuleType:
    """Where the steps between the collectives are computed."""
    return norm_ops if x.is_cuda and x.dtype != torch.float64 else norm_plain


def _summed(
    coupling: Tensor, dws: Sequence[Tensor], ranks: Ranks, replicas: tuple[int, ...]
) -> tuple[Tensor, Sequence[Tensor]]:
    """C summed over all ranks and dw over those that hold the same heads, who are neighbours, in one all-reduce.

    Each set of replicas has a place of its own in the buffer, and a rank leaves zeros in the others'.
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


class FullDimRMSNorm(nn.Module):
    """RMSNorm over all heads of all ranks: `x`, `[seq, batch, heads, head_dim]`, has this rank's heads.

    Every gradient is right without help: x's is this replica's share, and weight's is summed over the replicas.

    Args:
        local_dim: this rank's heads x head_dim, the weight's size.
        global_dim: N, all heads x head_dim.
        tp_group_getter: called once, now; a process group, or None for one process.

    Raises:
        ValueError: the group's ranks do not hold the heads equally often.
    """

    def __init__(
        self,
        local_dim: int,
        global_dim: int,
        tp_group_getter: GroupGetter,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks_of(tp_group_getter())
        self.global_dim, self.eps = global_dim, eps
        self.replicas, rest = divmod(self.ranks.size * local_dim, global_dim)
        if rest or not self.replicas or self.ranks.size % self.replicas:
            raise ValueError(
                f"every head must be on equally many ranks: {self.ranks.size} ranks of {local_dim} channels do not "
                f"hold {global_dim} channels a whole number of times: check the sizes and the process group"
            )
        self.weight = nn.Parameter(torch.ones(local_dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(x, self.weight)
        setting = Setting((self.global_dim * self.replicas,), self.eps, x.shape[-1], ())
        (y,) = head_norm(setting, self.ranks, (self.replicas,), None, None, [self.weight], [x])
        return y

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For megatron-core's checkpoints: the weight of all heads, of which this rank has a part or a copy of one."""
        return sharded_weights(self, {"weight": self.replicas}, self.ranks, prefix, sharded_offsets, metadata)


class FullDimQKNorm(nn.Module):
    """The query norm and the key norm in one step, and on request the fused qkv's split and RoPE in the same step.

    This rank has `num_heads / ranks` query heads. It has `num_kv_heads / ranks` key heads, or one where there are more
    ranks than key heads; then R neighbouring ranks share one, and each queries it with its part of the group's heads.

    Args:
        num_heads: query heads of all ranks.
        num_kv_heads: key heads of all ranks.
        tp_group_getter: called once, now; a process group, or None for one process.

    Raises:
        ValueError: the heads cannot be spread evenly over the ranks.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        tp_group_getter: GroupGetter,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks_of(tp_group_getter())
        size = self.ranks.size
        self.replicas = max(1, size // num_kv_heads)
        if num_heads % size or num_heads % num_kv_heads or (num_kv_heads * self.replicas) % size:
            raise ValueError(
                f"each rank must get whole query heads, and whole key heads or one that equally many ranks share: "
                f"found {num_heads} query heads and {num_kv_heads} key heads on {size} ranks"
            )
        self.heads, self.kv_heads = num_heads // size, num_kv_heads * self.replicas // size
        self.heads_per_group, self.head_dim, self.eps = num_heads // num_kv_heads, head_dim, eps
        self.terms = (num_heads * head_dim, num_kv_heads * head_dim * self.replicas)
        self.q_weight = nn.Parameter(torch.ones(self.heads * head_dim, dtype=dtype))
        self.k_weight = nn.Parameter(torch.ones(self.kv_heads * head_dim, dtype=dtype))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Norm this rank's query and key heads, `[seq, batch, heads, head_dim]`, which may be views of any strides.

        Raises:
            ValueError: other shapes; two dtypes, of the heads or of the weights.
        """
        _check("query", query, self.heads, self.head_dim)
        _check("key", key, self.kv_heads, self.head_dim)
        return self._apply_norm((), None, None, query, key)

    def forward_fused(
        self, mixed_qkv: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each dense, from the fused qkv; normed, then turned if `cos` and `sin` are given.

        Args:
            mixed_qkv: `[seq, batch, groups, (heads_per_group + 2) * head_dim]`: of each of this rank's key heads, the
                query heads that use it, then the key, then the value. It is read in place, and its gradient is written
                in place. Where ranks share a key head, all the group's query heads are there; a rank norms its own.
            cos, sin: `[seq, half]` or `[seq, batch, half]`, as `reference.rope.rotary_tables` makes them: the first 2 x
                `half` channels of each query and key head turn.

        Raises:
            ValueError: other shapes.
        """
        _check("mixed_qkv", mixed_qkv, self.kv_heads, (self.heads_per_group + 2) * self.head_dim)
        if cos is not None or sin is not None:
            self._check_tables(mixed_qkv, cos, sin)
        own = self.heads // self.kv_heads
        split = (self.ranks.rank % self.replicas * own, own)
        return self._apply_norm(split, cos, sin, mixed_qkv)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For megatron-core's checkpoints: the weights of all heads, of which this rank has parts or copies of them."""
        held = {"q_weight": 1, "k_weight": self.replicas}
        return sharded_weights(self, held, self.ranks, prefix, sharded_offsets, metadata)

    def _check_tables(self, mixed_qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
        seq, batch = mixed_qkv.shape[:2]
        found = [None if table is None else tuple(table.shape) for table in (cos, sin)]
        half = found[0][-1] if found[0] else self.head_dim
        if found[0] != found[1] or found[0] not in ((seq, half), (seq, batch, half)) or 2 * half > self.head_dim:
            raise ValueError(
                f"cos and sin must both be [seq, half] or [seq, batch, half], with seq {seq}, batch {batch} and 2 half "
                f"at most head_dim, {self.head_dim}: found {found[0]} and {found[1]}; make them with "
                f"reference.rope.rotary_tables"
            )

    def _apply_norm(
        self, split: tuple[int, ...], cos: Tensor | None, sin: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        weights = [self.q_weight, self.k_weight]
        for names, tensors in (("q_weight and k_weight", weights), ("query and key", inputs)):
            if tensors[0].dtype != tensors[-1].dtype:
                raise ValueError(
                    f"{names} must have one dtype: found {tensors[0].dtype} and {tensors[-1].dtype}; convert one"
                )
        setting = Setting(self.terms, self.eps, self.head_dim, split)
        return tuple(head_norm(setting, self.ranks, (1, self.replicas), cos, sin, weights, list(inputs)))
