"""What is fixed for a norm: its sizes, and where its parts lie in the tensors that it is called with."""

from typing import NamedTuple

from torch import Tensor


class NormSpec(NamedTuple):
    """A norm's constants, the same in every call."""

    terms: tuple[int, ...]
    """For each part (queries, keys) N R: all heads x head_dim, times the number of ranks that hold each head."""
    eps: float
    head_dim: int
    split: tuple[int, ...]
    """Of a fused qkv: the first of this rank's query heads in each group, and how many. () for one tensor a part."""


def parts_of(inputs: list[Tensor], spec: NormSpec) -> list[Tensor]:
    """Query, key (if there is one), value (of a fused qkv): `[seq, batch, groups, heads of a group * head_dim]`."""
    if not spec.split:
        return inputs
    (qkv,), (first, heads), dim = inputs, spec.split, spec.head_dim
    others = qkv.shape[-1] - (first + heads + 2) * dim
    _, query, _, key, value = qkv.split_with_sizes([first * dim, heads * dim, others, dim, dim], -1)
    return [query, key, value]
