"""Which slice of which Hugging Face tensor every rank's megatron-core parameter is made of, and back.

Every parameter is a stack, along its first axis, of rectangles cut from on-disk tensors (`Piece`), so sharding is
arithmetic on names and numbers. `parameters` says what a rank holds, `placements` where each on-disk tensor lies;
`shard` and `unshard` move the values.

megatron-core cuts its fused q, k, v into equal runs of rows. With more ranks than key/value heads a cut falls inside a
key/value group, and the ranks that share a key head each hold the same part of the key norm. The vocabulary is filled
up with zero rows so that it divides evenly.

Source: megatron-core ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, SelfAttention, TransformerBlock.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from reference.config import ModelConfig
from reference.parallelism import Coordinates, Parallelism, padded_vocab_size
from reference.weights import Dialect, Layout, Row, Scope, instances


class Piece(NamedTuple):
    """The rectangle `source[rows, cols]` of an on-disk tensor.

    Spans are (start, stop). `cols` is None for a vector, `source` is None for zero padding.
    """

    source: str | None
    rows: tuple[int, int]
    cols: tuple[int, int] | None


class Parameter(NamedTuple):
    """One parameter of one rank: its kind, its name there, its virtual pipeline chunk, and the pieces stacked in it.

    `sources` are the on-disk tensors of the whole weight, even if this rank's share is all padding.
    """

    row: Row
    name: str
    chunk: int
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    pieces: tuple[Piece, ...]


class Placement(NamedTuple):
    """Where a piece of an on-disk tensor lies: from row `start` on in parameter `name` of `chunk` on `rank`."""

    rank: int
    chunk: int
    name: str
    start: int
    piece: Piece


class _Rank(NamedTuple):
    config: ModelConfig
    parallelism: Parallelism
    at: Coordinates


class _Held(NamedTuple):
    """One weight on a rank. `layer` and `expert` count over the model, `local_layer` and `local_expert` on the rank."""

    row: Row
    layer: int
    expert: int
    chunk: int
    local_layer: int
    local_expert: int


def parameters(config: ModelConfig, parallelism: Parallelism, rank: int, dialect: Dialect) -> list[Parameter]:
    """Every parameter of a rank, under the names it has there (layers and experts counted from 0 on each rank).

    Raises:
        ValueError: the model does not divide by the parallel sizes (`Parallelism.check`), or there is no such rank.
    """
    parallelism.check(config)
    where = _Rank(config, parallelism, parallelism.coordinates(rank))
    return [_parameter(held, where, dialect) for held in _held(where)]


def _held(rank: _Rank) -> Iterator[_Held]:
    config, parallelism, at = rank
    stages, local_experts = parallelism.stages(config), config.num_local_experts // parallelism.ep
    chunks = {chunk: stages[chunk * parallelism.pp + at.pp] for chunk in range(parallelism.vpp)}
    ends = {"embedding": (at.pp == 0, 0), "head": (at.pp == parallelism.pp - 1, parallelism.vpp - 1)}
    end = "embedding"
    for row, layer, expert in instances(config):
        if row.scope is Scope.MODEL:
            here, chunk = ends[end]
            if here:
                yield _Held(row, 0, 0, chunk, 0, 0)
            continue
        end = "head"  # what follows the layers
        if row.scope is Scope.EXPERT and expert // local_experts != at.ep:
            continue
        for chunk, layers in chunks.items():
            if layer in layers:
                yield _Held(row, layer, expert, chunk, layer - layers.start, expert % local_experts)


def _parameter(held: _Held, rank: _Rank, dialect: Dialect) -> Parameter:
    sources = held.row.format(Dialect.HF_DISK, held.layer, held.expert)
    (name,) = held.row.format(dialect, held.local_layer, held.local_expert)
    whole = [
        Piece(source, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None)
        for source, shape in zip(sources, held.row.shapes(rank.config), strict=True)
    ]
    pieces = tuple(_CUTS[held.row.layout_in(dialect)](whole, rank))
    rows, cols = sum(_length(piece.rows) for piece in pieces), pieces[0].cols
    shape = (rows,) if cols is None else (rows, _length(cols))
    return Parameter(held.row, name, held.chunk, shape, sources, pieces)


# --- How each layout is cut: from the whole on-disk tensors of a row to one rank's pieces. ---


def _tensor_ranks(rank: _Rank) -> tuple[int, int]:
    return rank.parallelism.tp, rank.at.tp


def _expert_tensor_ranks(rank: _Rank) -> tuple[int, int]:
    return rank.parallelism.expert_tp, rank.at.etp


def _key_head_ranks(rank: _Rank) -> tuple[int, int]:
    shards = min(rank.parallelism.tp, rank.config.num_key_value_heads)
    return shards, rank.at.tp * shards // rank.parallelism.tp


def _rows(whole: list[Piece], rank: _Rank, *, over: Callable[[_Rank], tuple[int, int]]) -> list[Piece]:
    return [_rows_of(part, *over(rank)) for part in whole]


def _cols(whole: list[Piece], rank: _Rank, *, over: Callable[[_Rank], tuple[int, int]]) -> list[Piece]:
    return [part._replace(cols=_share(part.cols, *over(rank))) for part in whole if part.cols is not None]


def _vocabulary(whole: list[Piece], rank: _Rank) -> Iterator[Piece]:
    (table,) = whole
    padding = padded_vocab_size(rank.config, rank.parallelism) - rank.config.vocab_size
    return _run([table, Piece(None, (0, padding), table.cols)], *_tensor_ranks(rank))


def _qkv(whole: list[Piece], rank: _Rank) -> Iterator[Piece]:
    groups = rank.config.num_key_value_heads
    interleaved = [_rows_of(part, groups, group) for group in range(groups) for part in whole]
    return _run(interleaved, *_tensor_ranks(rank))


_CUTS: dict[Layout, Callable[[list[Piece], _Rank], Iterable[Piece]]] = {
    Layout.REPLICATED: lambda whole, _: whole,
    Layout.VOCABULARY: _vocabulary,
    Layout.QKV: _qkv,
    Layout.QUERY_HEADS: partial(_rows, over=_tensor_ranks),
    Layout.KEY_HEADS: partial(_rows, over=_key_head_ranks),
    Layout.COLUMNS: partial(_cols, over=_tensor_ranks),
    Layout.GATE_UP: partial(_rows, over=_expert_tensor_ranks),
    Layout.EXPERT_COLUMNS: partial(_cols, over=_expert_tensor_ranks),
}


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _share(span: tuple[int, int], parts: int, index: int) -> tuple[int, int]:
    """The `index`-th of `parts` equal runs of a span."""
    size = _length(span) // parts
    return span[0] + index * size, span[0] + (index + 1) * size


def _rows_of(piece: Piece, parts: int, index: int) -> Piece:
    return piece._replace(rows=_share(piece.rows, parts, index))


def _run(stack: list[Piece], parts: int, index: int) -> Iterator[Piece]:
    """What an equal run of the rows of a stack covers, piece by piece."""
    return rows_of(stack, *_share((0, sum(_length(piece.rows) for piece in stack)), parts, index))


def rows_of(stack: Iterable[Piece], first: int, last: int) -> Iterator[Piece]:
    """What rows `first:last` of a stack of pieces cover, piece by piece."""
    for piece in stack:
        start, stop = max(first, 0), min(last, _length(piece.rows))
        if start < stop:
            yield piece._replace(rows=(piece.rows[0] + start, piece.rows[0] + stop))
        first, last = first - _length(piece.rows), last - _length(piece.rows)


# --- The inverse, and both directions on tensors. ---


def placements(held: dict[int, list[Parameter]]) -> dict[str, list[Placement]]:
    """For each on-disk tensor, the different pieces that the ranks hold of it, ordered by position in the tensor.

    `held` has each rank's `parameters`. Of several ranks that hold the same piece the first is named. `check_coverage`
    checks that the pieces make up whole tensors.
    """
    found: dict[str, dict[Piece, Placement]] = {}
    for rank, rank_parameters in held.items():
        for parameter in rank_parameters:
            start = 0
            for piece in parameter.pieces:
                if piece.source is not None:
                    place = Placement(rank, parameter.chunk, parameter.name, start, piece)
                    found.setdefault(piece.source, {}).setdefault(piece, place)
                start += _length(piece.rows)
    return {source: sorted(places.values(), key=lambda place: place.piece[1:]) for source, places in found.items()}


def check_coverage(placed: dict[str, list[Placement]], config: ModelConfig) -> None:
    """Check that the ranks hold every element of every on-disk tensor exactly once.

    Raises:
        ValueError: they do not; names the tensor, what is held and what is expected.
    """
    for row, layer, expert in instances(config):
        names = row.format(Dialect.HF_DISK, layer, expert)
        for name, shape in zip(names, row.shapes(config), strict=True):
            spans = [place.piece[1:] for place in placed.get(name, [])]
            if not _tile(spans, shape):
                raise ValueError(
                    f"{name}: the ranks hold rows and columns {spans} of it, expected a tiling of {list(shape)}; "
                    "ranks are missing, or come from different layouts"
                )


def _tile(spans: list[tuple[tuple[int, int], tuple[int, int] | None]], shape: tuple[int, ...]) -> bool:
    """Whether sorted rectangles cover `shape` once: bands of whole rows, or bands of whole columns."""
    full = tuple((0, size) for size in shape)
    rows = [(span, cols) for span, cols in spans]
    by_rows = all(cols in (None, full[-1]) for _, cols in rows) and _chain([span for span, _ in rows], shape[0])
    by_cols = all(span == full[0] for span, _ in rows) and _chain([cols for _, cols in rows if cols], shape[-1])
    return by_rows or by_cols


def _chain(spans: list[tuple[int, int]], size: int) -> bool:
    ends = [0, *(stop for _, stop in spans)]
    return ends[-1] == size and all(start == end for (start, _), end in zip(spans, ends[:-1], strict=True))


def shard(parameter: Parameter, tensors: dict[str, Tensor]) -> Tensor:
    """The parameter's value: its pieces cut from whole on-disk tensors and stacked; padding is zero.

    Raises:
        ValueError: a source is missing.
    """
    for source in parameter.sources:
        if source not in tensors:
            raise ValueError(f"{parameter.name}: needs {source}, which was not given")
    like = tensors[parameter.sources[0]]
    return torch.cat([_cut(piece, tensors, like) for piece in parameter.pieces])


def _cut(piece: Piece, tensors: dict[str, Tensor], like: Tensor) -> Tensor:
    if piece.source is None:
        return like.new_zeros((_length(piece.rows), *like.shape[1:]))
    rows = tensors[piece.source][slice(*piece.rows)]
    return rows if piece.cols is None else rows[:, slice(*piece.cols)]


def unshard(places: list[Placement], values: dict[tuple[int, int, str], Tensor]) -> Tensor:
    """The on-disk tensor, from the parameters that hold it: `values[rank, chunk, name]`."""
    bands = []
    for rank, chunk, name, start, piece in places:
        bands.append(values[rank, chunk, name][start : start + _length(piece.rows)])
    rows_differ = len({place.piece.rows for place in places}) > 1
    return torch.cat(bands, 0 if rows_differ or len(places) == 1 else 1)
