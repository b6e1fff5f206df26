"""How whole weights are fused and taken apart: q, k, v in megatron-core's order, gate over up, experts stacked.

Only rows move: every function works on matrices, vectors (biases, norms) and any dtype, and its inverse gives back the
same bits. `reference.sharding` says which part of a fused weight a rank holds.
"""

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor


def merge_qkv(
    q: Shaped[Tensor, "query *cols"],
    k: Shaped[Tensor, "key *cols"],
    v: Shaped[Tensor, "key *cols"],
    *,
    num_query_groups: int,
) -> Shaped[Tensor, "query+2*key *cols"]:
    """Stack rows group by group: the group's query heads, its key head, its value head.

    Source: megatron-core attention: SelfAttention.get_query_key_value_tensors.

    Raises:
        ValueError: rows do not divide into groups.
    """
    for name, part in (("q", q), ("k", k), ("v", v)):
        if part.shape[0] % num_query_groups:
            raise ValueError(f"{name}: {part.shape[0]} rows do not divide into {num_query_groups} query groups")
    grouped = (rearrange(part, "(g r) ... -> g r ...", g=num_query_groups) for part in (q, k, v))
    return torch.cat(tuple(grouped), 1).flatten(0, 1)


def split_qkv(
    qkv: Shaped[Tensor, "rows *cols"], *, num_query_groups: int, heads_per_group: int
) -> tuple[Shaped[Tensor, "query *cols"], Shaped[Tensor, "key *cols"], Shaped[Tensor, "key *cols"]]:
    """The inverse of `merge_qkv`.

    Raises:
        ValueError: rows do not divide into groups of `heads_per_group` + 2 heads.
    """
    heads = num_query_groups * (heads_per_group + 2)
    if qkv.shape[0] % heads:
        raise ValueError(
            f"linear_qkv: {qkv.shape[0]} rows do not divide into {num_query_groups} groups of {heads_per_group} query "
            "heads, a key head and a value head"
        )
    head_dim = qkv.shape[0] // heads
    grouped = rearrange(qkv, "(g r) ... -> g r ...", g=num_query_groups)
    q, k, v = grouped.split([heads_per_group * head_dim, head_dim, head_dim], 1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def merge_gate_up(
    w1: Shaped[Tensor, "width *cols"], w3: Shaped[Tensor, "width *cols"]
) -> Shaped[Tensor, "2*width *cols"]:
    """[w1; w3]: the gate's rows over the up projection's.

    Source: `transformers` minimax_m2: MiniMaxM2Experts.gate_up_proj; megatron-core linear_fc1.
    """
    return torch.cat((w1, w3))


def split_gate_up(
    fc1: Shaped[Tensor, "rows *cols"],
) -> tuple[Shaped[Tensor, "width *cols"], Shaped[Tensor, "width *cols"]]:
    """The inverse of `merge_gate_up`.

    Raises:
        ValueError: the number of rows is odd.
    """
    if fc1.shape[0] % 2:
        raise ValueError(f"linear_fc1: {fc1.shape[0]} rows, expected an even number (gate over up)")
    w1, w3 = fc1.chunk(2)
    return w1, w3


def stack_experts(experts: list[Tensor]) -> Shaped[Tensor, "experts *shape"]:
    """Expert e at index e of a new first axis. Source: `transformers` minimax_m2: MiniMaxM2Experts."""
    return torch.stack(experts)


def unstack_experts(stacked: Shaped[Tensor, "experts *shape"]) -> list[Tensor]:
    """The inverse of `stack_experts`."""
    return list(stacked.unbind())
