"""What a rank reads to load a model: slices of on-disk tensors, in batches, each read and decoded as a whole.

`reference.sharding` says which rows and columns of which on-disk tensors a parameter is a stack of. They are cut into
slices of at most `SLICE_BYTES`, sorted by their position in the files, and packed into batches of at most
`BATCH_BYTES`: first the values, grouped by shape and dtype, then the scales of the blocks that float8 slices touch.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.huggingface.safetensors_folder import SafetensorsFolder
from bridge.weights.sharded_model import ShardedModel
from reference.fp8 import FP8
from reference.sharding import Piece

SLICE_BYTES, BATCH_BYTES = 8 << 20, 32 << 20
_ALIGNMENT = 256


class Slice(NamedTuple):
    """`source[rows, cols]` of the checkpoint, and the row of a parameter where it goes.

    If it is float8: the blocks that its rows and columns touch, and where they start inside the first of these.
    """

    source: str
    dtype: torch.dtype
    rows: slice
    cols: slice | None
    blocks: tuple[slice, ...]
    offsets: tuple[int, ...]
    parameter: Tensor
    at: int

    @property
    def shape(self) -> tuple[int, ...]:
        return _lengths(span for span in (self.rows, self.cols) if span is not None)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of its scales, () without."""
        return _lengths(self.blocks)


class Group(NamedTuple):
    """Slices of one shape, dtype and place in their blocks, one after another from byte `start` of their batch.

    Each has scales of the shape `grid` (none: it is not float8), from byte `scales` of the batch's.
    """

    slices: list[Slice]
    start: int
    scales: int
    grid: tuple[int, ...]

    @property
    def scale_bytes(self) -> int:
        """Of one slice."""
        return _scale_bytes(self.grid)


class Batch(NamedTuple):
    """What is read at once: groups' values, and from byte `scales_at` on their scales."""

    groups: list[Group]
    scales_at: int
    nbytes: int


def plan_batches(sharded: ShardedModel, files: SafetensorsFolder, block_size: int) -> list[Batch]:
    """Batches of all that this rank needs, in the order of the files. Fills padding rows with zero; reads nothing."""
    return _pack(_slices(sharded, files, block_size))


def _slices(sharded: ShardedModel, files: SafetensorsFolder, block_size: int) -> list[Slice]:
    found = []
    for mapping in sharded.registry:
        parameter, start = mapping.parameter, 0
        value = sharded.state[parameter.chunk, parameter.name]
        for piece in parameter.pieces:
            stop = start + piece.rows[1] - piece.rows[0]
            if piece.source is None:
                value[start:stop].zero_()
            else:
                found += _split(piece, files.tensors[piece.source].dtype, block_size, value, start)
            start = stop
    order = {file: number for number, file in enumerate(dict.fromkeys(i.file for i in files.tensors.values()))}

    def position(part: Slice) -> tuple[int, int, int]:
        info = files.tensors[part.source]
        return order[info.file], info.offset, part.rows.start

    return sorted(found, key=position)


def _split(piece: Piece, dtype: torch.dtype, block_size: int, value: Tensor, at: int) -> Iterator[Slice]:
    """A piece in runs of rows of at most `SLICE_BYTES`."""
    assert piece.source is not None
    (first, last), cols = piece.rows, None if piece.cols is None else slice(*piece.cols)
    width = 1 if cols is None else cols.stop - cols.start
    step = max(1, SLICE_BYTES // (width * dtype.itemsize))
    for start in range(first, last, step):
        rows = slice(start, min(start + step, last))
        blocked = (rows, cols) if dtype == FP8 else ()
        blocks = tuple(slice(span.start // block_size, -(-span.stop // block_size)) for span in blocked)
        offsets = tuple(span.start % block_size for span in blocked)
        yield Slice(piece.source, dtype, rows, cols, blocks, offsets, value, at + start - first)


def _pack(slices: Iterable[Slice]) -> list[Batch]:
    """Slices in batches of at most `BATCH_BYTES` (or of one slice)."""
    taken: list[list[Slice]] = []
    end = BATCH_BYTES
    for part in slices:
        needed = _aligned(part.nbytes) + _scale_bytes(part.grid)
        if end + needed > BATCH_BYTES:
            taken.append([])
            end = 0
        taken[-1].append(part)
        end += needed
    return [_batch(parts) for parts in taken]


def _batch(slices: list[Slice]) -> Batch:
    alike: dict[tuple, list[Slice]] = {}
    for part in slices:
        alike.setdefault((part.grid, part.offsets, part.dtype, part.shape, part.parameter.dtype), []).append(part)
    groups, end, scales = [], 0, 0
    for (grid, *_), parts in alike.items():
        groups.append(Group(parts, end, scales, grid))
        end = _aligned(end + len(parts) * parts[0].nbytes)
        scales += len(parts) * _scale_bytes(grid)
    return Batch(groups, end, end + scales)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _lengths(spans: Iterable[slice]) -> tuple[int, ...]:
    return tuple(span.stop - span.start for span in spans)


def _scale_bytes(grid: tuple[int, ...]) -> int:
    return math.prod(grid) * torch.float32.itemsize if grid else 0
