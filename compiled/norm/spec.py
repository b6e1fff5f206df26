"""What a norm is told once: its sizes, and where its parts lie in what it is called with."""

from typing import NamedTuple

from torch import Tensor


class NormSpec(NamedTuple):
    """What does not change from call to call."""

    terms: tuple[int, ...]
    """For each part N R, the number of terms in S: all heads x head_dim, counted as often as ranks hold them."""
    eps: float
    head_dim: int
    split: tuple[int, ...]
    """Of a fused qkv, which query heads of each group are this rank's: first, how many. () for one tensor a part."""


def parts_of(inputs: list[Tensor], spec: NormSpec) -> list[Tensor]:
    """Views `[seq, batch, groups, heads of a group * head_dim]`: query, key if any; of a fused qkv also the value."""
    if not spec.split:
        return inputs
    (qkv,), (first, heads), dim = inputs, spec.split, spec.head_dim
    others = qkv.shape[-1] - (first + heads + 2) * dim
    _, query, _, key, value = qkv.split_with_sizes([first * dim, heads * dim, others, dim, dim], -1)
    return [query, key, value]
