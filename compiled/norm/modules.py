"""The norms as modules: over all query heads and all key heads of all tensor-parallel ranks, and over the hidden size.

Outputs and gradients equal those of one process that has all heads, at any tensor-parallel size; the formulas are in
`compiled.norm.function`. All compile with `fullgraph=True`, at most twice for any number of sequence lengths.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compiled.norm.collectives import GroupGetter, process_group_info
from compiled.norm.function import check_channels, head_norm
from compiled.norm.sharded_state import sharded_weights
from compiled.norm.spec import NormSpec


def _check(name: str, x: Tensor, *last: int) -> None:
    if x.dim() != 4 or x.shape[2:] != last:
        expected = ", ".join(map(str, last))
        raise ValueError(
            f"{name} must be [seq, batch, {expected}]: found {tuple(x.shape)}; give this rank's heads, no others"
        )


class FullDimRMSNorm(nn.Module):
    """RMSNorm over all heads of all ranks: `x`, `[seq, batch, heads, head_dim]`, has this rank's heads.

    The gradients need no further reduction for the norm's sake: the weight's is already summed over the ranks that hold
    the same heads, and x's is this rank's share, which the layer before sums as it would without a norm.

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
        self.ranks = process_group_info(tp_group_getter())
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
        spec = NormSpec((self.global_dim * self.replicas,), self.eps, x.shape[-1], ())
        (y,) = head_norm(spec, self.ranks, (self.replicas,), None, None, [self.weight], [x])
        return y

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For megatron-core's checkpoints: the weight of all heads; this rank holds a part or a copy of one."""
        return sharded_weights(self, {"weight": self.replicas}, self.ranks, prefix, sharded_offsets, metadata)


class ReplicatedFullDimRMSNorm(nn.Module):
    """RMSNorm over all heads of all ranks, with the weight of all heads on every rank: a rank uses its own heads' part.

    For trainers that sum a norm weight's gradient over the tensor-parallel ranks. On each rank it is zero outside the
    rank's part, and of ranks that share a head each has its share, so that the sum is the whole gradient. x's gradient
    is this replica's share, as with `FullDimRMSNorm`.

    Args:
        num_heads: of all ranks; where there are more ranks, neighbours share a head.
        tp_group_getter: called once, now; a process group, or None for one process.

    Raises:
        ValueError: the heads cannot be spread evenly over the ranks.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        tp_group_getter: GroupGetter,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        self.ranks = process_group_info(tp_group_getter())
        replicas = max(1, self.ranks.size // num_heads)
        if num_heads * replicas % self.ranks.size:
            raise ValueError(
                f"each rank must get whole heads, or one that equally many ranks share: found {num_heads} heads on "
                f"{self.ranks.size} ranks; choose a tensor-parallel size that divides the heads, or a multiple of them"
            )
        local_dim = num_heads * replicas // self.ranks.size * head_dim
        first = self.ranks.rank // replicas * local_dim
        self.own = slice(first, first + local_dim)
        self.spec = NormSpec((num_heads * head_dim * replicas,), eps, head_dim, ())
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Norm this rank's heads, `[seq, batch, heads, head_dim]`."""
        weight = self.weight[self.own]
        check_channels(x, weight)
        # One replica: the caller sums the weight's gradient over those that there are.
        (y,) = head_norm(self.spec, self.ranks, (1,), None, None, [weight], [x])
        return y


class FullDimQKNorm(nn.Module):
    """The query norm and the key norm in one step; `forward_fused` also splits the fused qkv and applies RoPE.

    Each rank has `num_heads / ranks` query heads and `num_kv_heads / ranks` key heads. Where there are more ranks than
    key heads, R neighbouring ranks hold the same key head, and each has a part of that group's query heads.

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
        self.ranks = process_group_info(tp_group_getter())
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
        query, key = self._apply_norm((), None, None, query, key)
        return query, key

    def forward_fused(
        self, mixed_qkv: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each dense, from the fused qkv; normed, then rotated if `cos` and `sin` are given.

        Args:
            mixed_qkv: `[seq, batch, groups, (heads_per_group + 2) * head_dim]`: for each of this rank's key heads, the
                query heads that use it, then the key, then the value. It is not split into copies first, nor is its
                gradient put together from parts. Where ranks share a key head, it holds all query heads of the group,
                and a rank norms its own.
            cos, sin: `[seq, half]` or `[seq, batch, half]`, as `reference.rope.rotary_tables` makes them; they rotate
                the first `2 * half` channels of each query and key head.

        Raises:
            ValueError: other shapes.
        """
        _check("mixed_qkv", mixed_qkv, self.kv_heads, (self.heads_per_group + 2) * self.head_dim)
        if cos is not None or sin is not None:
            self._check_tables(mixed_qkv, cos, sin)
        own = self.heads // self.kv_heads
        split = (self.ranks.rank % self.replicas * own, own)
        query, key, value = self._apply_norm(split, cos, sin, mixed_qkv)
        return query, key, value

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For megatron-core's checkpoints: the weights of all heads; this rank holds parts or copies of parts."""
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
    ) -> Sequence[Tensor]:
        weights = [self.q_weight, self.k_weight]
        for names, tensors in (("q_weight and k_weight", weights), ("query and key", inputs)):
            if tensors[0].dtype != tensors[-1].dtype:
                raise ValueError(
                    f"{names} must have one dtype: found {tensors[0].dtype} and {tensors[-1].dtype}; convert one"
                )
        spec = NormSpec(self.terms, self.eps, self.head_dim, split)
        return head_norm(spec, self.ranks, (1, self.replicas), cos, sin, weights, list(inputs))


class RMSNorm(nn.Module):
    """y = w * round(x r), r = (mean(x^2) + eps)^(-1/2), over the last axis of `[seq, batch, hidden]`.

    Computed like the query and key norms, as a single head as wide as the hidden state, without collectives.

    Args:
        sequence_parallel: whether each rank has its own part of the tokens. The weight is marked with it, and
            megatron-core then sums its gradient over the tensor-parallel ranks.
    """

    def __init__(
        self, hidden: int, eps: float = 1e-6, dtype: torch.dtype | None = None, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden, dtype=dtype))
        # megatron-core's mark, an attribute that torch does not declare
        self.weight.sequence_parallel = sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        hidden = len(self.weight)
        if x.dim() != 3 or x.shape[-1] != hidden:
            raise ValueError(f"x must be [seq, batch, {hidden}], as wide as the weight: found {tuple(x.shape)}")
        spec = NormSpec((hidden,), self.eps, hidden, ())
        (y,) = head_norm(spec, process_group_info(None), (1,), None, None, [self.weight], [x.unsqueeze(-2)])
        return y.squeeze(-2)
