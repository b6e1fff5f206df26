"""What a rank reads to load a model: slices of on-disk tensors, in batches, each read and decoded as a whole.

`reference.sharding` says which rows and columns of which on-disk tensors a parameter is a stack of. They are cut into
slices of at most `SLICE_BYTES`, sorted by their position in the files, and packed into batches of at most
`BATCH_BYTES`: first the values, grouped by shape and dtype, then the scales of the blocks that float8 slices touch.

**Bytes.** Rows are read whole, of weights and of scales. Tensor parallelism cuts w2 and o_proj by columns, so that a
rank of n reads all of them, n times its share; everything else is cut by rows or not at all. w2 is a third of an
expert: experts cut in n are read (n + 2) / 3 times, 1.33 at n = 2, 2 at 4 and 3.33 at 8. Reading only the columns would
touch the same pages of a file, for they are 4096 bytes and a row of w2 is 1536, and is 3072 reads for each w2 instead
of one: from the page cache that takes 5 to 8 times the processor time of whole rows, at n = 2, 4 and 8 alike.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.huggingface.safetensors_folder import SafetensorsFolder
from bridge.weights.sharded_model import ShardedModel
from reference.checkpoint import SCALE_SUFFIX
from reference.fp8 import FP8
from reference.sharding import Piece

SLICE_BYTES, BATCH_BYTES = 8 << 20, 32 << 20
_ALIGNMENT = 256


class Slice(NamedTuple):
    """Rows of an on-disk tensor, of which a parameter has the columns `cols`, from its row `at` on.

    `shape` is that of the whole rows, which are read. If they are float8, `blocks` are the rows and columns of blocks
    that the slice touches, `offsets` says where it starts inside the first of them, and `grid` is the shape of the
    scales that are read, whole rows too, of `scale_dtype`. Else these are empty.
    """

    source: str
    dtype: torch.dtype
    rows: slice
    cols: slice | None
    shape: tuple[int, ...]
    blocks: tuple[slice, ...]
    offsets: tuple[int, ...]
    grid: tuple[int, ...]
    scale_dtype: torch.dtype | None
    parameter: Tensor
    at: int

    @property
    def nbytes(self) -> int:
        """Of the whole rows."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Of the whole rows of scales; 0 without."""
        return math.prod(self.grid) * self.scale_dtype.itemsize if self.scale_dtype else 0


class Group(NamedTuple):
    """Slices that are alike but for their source, parameter and position: decoded by one launch.

    In their batch their rows follow one another from byte `start` on, and their scales from byte `scales` of the
    batch's scales on.
    """

    slices: list[Slice]
    start: int
    scales: int


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
                found += _split(piece, files, block_size, value, start)
            start = stop
    order = {file: number for number, file in enumerate(dict.fromkeys(i.file for i in files.tensors.values()))}

    def position(part: Slice) -> tuple[int, int, int]:
        info = files.tensors[part.source]
        return order[info.file], info.offset, part.rows.start

    return sorted(found, key=position)


def _split(piece: Piece, files: SafetensorsFolder, block_size: int, parameter: Tensor, at: int) -> Iterator[Slice]:
    """A piece in runs of whole rows of at most `SLICE_BYTES`."""
    assert piece.source is not None
    info = files.tensors[piece.source]
    scale_dtype = files.tensors[piece.source + SCALE_SUFFIX].dtype if info.dtype == FP8 else None
    (first, last), cols = piece.rows, None if piece.cols is None else slice(*piece.cols)
    row = info.shape[1:]
    step = max(1, SLICE_BYTES // (math.prod(row) * info.dtype.itemsize))
    for start in range(first, last, step):
        rows = slice(start, min(start + step, last))
        blocked = ()
        if info.dtype == FP8:
            assert cols is not None  # float8 tensors are matrices
            blocked = rows, cols
        blocks = tuple(slice(span.start // block_size, -(-span.stop // block_size)) for span in blocked)
        offsets = tuple(span.start % block_size for span in blocked)
        grid = (blocks[0].stop - blocks[0].start, -(-row[0] // block_size)) if blocks else ()
        shape = (rows.stop - rows.start, *row)
        place = parameter, at + start - first
        yield Slice(piece.source, info.dtype, rows, cols, shape, blocks, offsets, grid, scale_dtype, *place)


def _pack(slices: Iterable[Slice]) -> list[Batch]:
    """Slices in batches of at most `BATCH_BYTES` (or of one slice)."""
    taken: list[list[Slice]] = []
    end = BATCH_BYTES
    for part in slices:
        needed = _aligned(part.nbytes) + _aligned(part.scale_bytes)
        if end + needed > BATCH_BYTES:
            taken.append([])
            end = 0
        taken[-1].append(part)
        end += needed
    return [_batch(parts) for parts in taken]


def _batch(slices: list[Slice]) -> Batch:
    alike: dict[tuple, list[Slice]] = {}
    for part in slices:
        scales_of = part.grid, part.scale_dtype
        key = (part.dtype, part.cols, part.shape, part.offsets, *scales_of, part.parameter.dtype)
        alike.setdefault(key, []).append(part)
    groups, end, scales = [], 0, 0
    for parts in alike.values():
        groups.append(Group(parts, end, scales))
        end = _aligned(end + len(parts) * parts[0].nbytes)
        scales = _aligned(scales + len(parts) * parts[0].scale_bytes)
    return Batch(groups, end, end + scales)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
