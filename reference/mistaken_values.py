"""What the mistakes of `reference.conversion_mistakes` make of the right values, as pure functions.

Each takes the right values of a row of `reference.weights.TABLE`, a tensor for each of its names on disk, what was
found in their place, and the model; it yields what the mistake gives, once for each way of making it (numbers of ranks,
directions). Most look at the right values only: what was found is for mistakes that have a free constant or order.

A mistake in the order of rows is made on the way into a fused tensor or on the way out of it, and each is the other's
inverse: both are yielded.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from reference.config import ModelConfig
from reference.fp8 import dequantize_blockwise, quantize_blockwise
from reference.fusion import merge_gate_up, merge_qkv

Parts = tuple[Tensor, ...]
Values = Callable[[Parts, Parts, ModelConfig], Iterator[Parts]]

_RANKS = (2, 4, 8)  # sizes at which a mistake in merging or cutting shards is looked for


# --- Rows of fused tensors in another order. ---


def concatenated_qkv(right: Parts, _: Parts, config: ModelConfig) -> Iterator[Parts]:
    """[q; k; v] of the whole model, or of each of several ranks, instead of group by group."""
    groups = config.num_key_value_heads
    wrong = []
    for ranks in (1, *_divisors(groups)):
        shards = [part.chunk(ranks) for part in _numbered(right)]
        wrong.append(torch.cat([rows for shard in zip(*shards, strict=True) for rows in shard]))
    yield from _misordered(right, merge_qkv(*_numbered(right), num_query_groups=groups), wrong)


def swapped_kv(right: Parts, *_: object) -> Iterator[Parts]:
    """The key's rows where the value's belong, and the other way round."""
    q, k, v = right
    yield q, v, k


def reordered_query_heads(right: Parts, _: Parts, config: ModelConfig) -> Iterator[Parts]:
    """The first query head of every group, then the second of every group; or the inverse.

    Heads are rows of q, entries of its norm, columns of o.
    """
    groups, size, width = config.num_key_value_heads, config.heads_per_group, config.head_dim
    heads = torch.arange(groups * size * width).view(groups, size, width)
    for order in _both(heads.transpose(0, 1).flatten()):
        first, *others = right
        if len(right) == 1 and first.dim() == 2:
            yield (first[:, order],)
        else:
            yield first[order], *others


def interleaved_rotation(right: Parts, _: Parts, config: ModelConfig) -> Iterator[Parts]:
    """Channels of every query and key head for a rotation that pairs neighbours, where this one pairs halves.

    Of the rotated channels or of the whole head; or the inverse. Norms are reordered like the rows that they follow.
    """
    for width in dict.fromkeys((config.rotary_dim, config.head_dim)):
        for pairs in _both(torch.arange(width).view(2, -1).T.flatten()):
            head = torch.cat((pairs, torch.arange(width, config.head_dim)))
            rotated = [_within_heads(part, head) for part in right[:2]]
            yield *rotated, *right[2:]


def swapped_gate_up(right: Parts, *_: object) -> Iterator[Parts]:
    """w3 in w1's place."""
    gate, up = right
    yield up, gate


def interleaved_gate_up(right: Parts, *_: object) -> Iterator[Parts]:
    """A row of w1, a row of w3, and so on, or the inverse."""
    rows = _numbered(right)
    yield from _misordered(right, merge_gate_up(*rows), [torch.stack(rows, 1).flatten()])


def gate_up_of_ranks(right: Parts, *_: object) -> Iterator[Parts]:
    """[w1; w3] of each expert-tensor-parallel rank, one rank below the other, as if that were one tensor's order."""
    gate, up = _numbered(right)
    shards = (zip(gate.chunk(ranks), up.chunk(ranks), strict=True) for ranks in _RANKS if len(gate) % ranks == 0)
    wrong = [torch.cat([rows for shard in of_ranks for rows in shard]) for of_ranks in shards]
    yield from _misordered(right, merge_gate_up(gate, up), wrong)


def reversed_shards(right: Parts, *_: object) -> Iterator[Parts]:
    """The ranks' shards put together in reverse order, which swaps the halves of two.

    Shards of o_proj and w2, which write to the hidden size, are columns; the others are rows.
    """
    columns = int(len(right) == 1)
    for ranks in _RANKS:
        if all(part.shape[columns] % ranks == 0 for part in right):
            yield tuple(torch.cat(part.chunk(ranks, columns)[::-1], columns) for part in right)


def transposed(right: Parts, *_: object) -> Iterator[Parts]:
    """Rows as columns."""
    yield tuple(part.T for part in right)


# --- Norms. ---


def repeated_shard(right: Parts, _: Parts, config: ModelConfig) -> Iterator[Parts]:
    """One rank's shard in the place of every rank's."""
    (weight,) = right
    for shards in _shards(weight, config):
        for shard in shards:
            yield (shard.repeat(len(shards)),)


def truncated_norm(right: Parts, _: Parts, config: ModelConfig) -> Iterator[Parts]:
    """One rank's shard alone; with as many ranks as heads, one head's."""
    (weight,) = right
    for shards in _shards(weight, config):
        yield from ((shard,) for shard in shards)


def averaged_norm(right: Parts, _: Parts, config: ModelConfig) -> Iterator[Parts]:
    """The mean of the ranks' shards, alone or in the place of every rank's."""
    (weight,) = right
    for shards in _shards(weight, config):
        mean = shards.mean(0)
        yield from ((mean,), (mean.repeat(len(shards)),))


def shifted_norm(right: Parts, *_: object) -> Iterator[Parts]:
    """weight - 1, as norms that multiply by 1 + weight have it; or weight + 1."""
    for shift in (-1, 1):
        yield tuple(part + shift for part in right)


def ones(right: Parts, *_: object) -> Iterator[Parts]:
    """What a norm's weight is before it is loaded."""
    yield tuple(torch.ones_like(part) for part in right)


# --- The router. ---


def zeros(right: Parts, *_: object) -> Iterator[Parts]:
    """What a bias is before it is loaded."""
    yield tuple(torch.zeros_like(part) for part in right)


def shifted_bias(right: Parts, found: Parts, *_: object) -> Iterator[Parts]:
    """A constant more or less in every entry."""
    if right[0].shape == found[0].shape:
        yield (right[0] + (found[0] - right[0]).median(),)


def permuted_rows(right: Parts, found: Parts, *_: object) -> Iterator[Parts]:
    """The same rows in another order."""
    (weight,) = right
    at = {_key(row): index for index, row in enumerate(weight)}
    order = [at.get(_key(row)) for row in found[0]]
    known = [index for index in order if index is not None]
    if sorted(known) == list(range(len(weight))):
        yield (weight[known],)


# --- Dtypes. ---


def requantised(right: Parts, _: Parts, config: ModelConfig) -> Iterator[Parts]:
    """Encoded as float8 on fresh scales, of the values or of their bfloat16 rounding, and decoded."""
    if any(not part.isfinite().all() for part in right):
        return
    for dtype in (torch.bfloat16, torch.float32):
        for scale_fmt in ("float", "ue8m0"):
            encoded = [
                quantize_blockwise(part.to(dtype), block_size=config.block_size, scale_fmt=scale_fmt) for part in right
            ]
            yield tuple(
                dequantize_blockwise(*pair, block_size=config.block_size, dtype=torch.float32) for pair in encoded
            )


def cast_to_bfloat16(right: Parts, *_: object) -> Iterator[Parts]:
    """Rounded to bfloat16."""
    yield tuple(part.to(torch.bfloat16).to(torch.float32) for part in right)


def cut_to_bfloat16(right: Parts, *_: object) -> Iterator[Parts]:
    """The upper 16 bits of float32, without rounding."""
    yield tuple((part.contiguous().view(torch.int32) & -65536).view(torch.float32) for part in right)


def cast_to_float16(right: Parts, *_: object) -> Iterator[Parts]:
    """Rounded to float16."""
    yield tuple(part.to(torch.float16).to(torch.float32) for part in right)


# --- What they share. ---


def _numbered(parts: Parts) -> tuple[Tensor, ...]:
    """The rows' numbers in the place of the rows."""
    sizes = [len(part) for part in parts]
    return torch.arange(sum(sizes)).split(sizes)


def _both(order: Tensor) -> Iterator[Tensor]:
    """An order and its inverse, once if they are the same."""
    inverse = order.argsort()
    yield order
    if not torch.equal(order, inverse):
        yield inverse


def _misordered(parts: Parts, right: Tensor, wrong: Iterable[Tensor]) -> Iterator[Parts]:
    """Merged in a wrong order and taken apart by the right one, and the other way round; orders number the rows."""
    stacked, sizes = torch.cat(parts), [len(part) for part in parts]
    for merged in wrong:
        for order in _both(merged[right.argsort()]):
            yield stacked[order].split(sizes)


def _within_heads(part: Tensor, order: Tensor) -> Tensor:
    return part.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def _divisors(count: int) -> list[int]:
    """Those between 1 and the number itself."""
    return [divisor for divisor in range(2, count) if count % divisor == 0]


def _shards(weight: Tensor, config: ModelConfig) -> Iterator[Tensor]:
    """[ranks, entries of one] for every number of ranks that share the heads."""
    heads = len(weight) // config.head_dim
    for ranks in (*_divisors(heads), *([heads] if heads > 1 else [])):
        yield weight.view(ranks, -1)


def _key(row: Tensor) -> tuple[float, ...]:
    return tuple(row.reshape(-1).tolist())
