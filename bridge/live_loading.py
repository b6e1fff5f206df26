"""A checkpoint into a live model: each rank reads the bytes of its own slices, and nothing else, from the files.

    files --threads--> pinned memory --one copy a batch--> device --decode--> rows of the parameter

`reference.sharding` says which rows and columns of which on-disk tensors a parameter is a stack of. They are cut into
slices of at most `SLICE_BYTES`, sorted as they lie in the files, and packed into batches of `BATCH_BYTES`: the values,
slices that are alike together, and after them the scales of the blocks that float8 slices touch. A batch is read in one
go and decoded in a launch for each group of alike slices, for Python's time, not the bytes, is what there is little of:
every call of it waits for the lock that the other threads hold.

A few threads read batches ahead of the decoding, at most `WINDOW` of them; float8 goes to the device as it is, and is
decoded into its place there. Beyond the model a rank needs WINDOW + COPYING batches of host memory and COPYING of the
device's, whatever the model's size.

Scales are checked on the host as they are read. NaN codes become NaN weights, which one look at the finished
parameters finds: the device is waited for once.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bridge import live_reads
from bridge.agreement import together
from bridge.hf_files import HFCheckpoint
from bridge.live_layout import LiveModel
from bridge.progress import Track, untracked
from compiled import fp8
from reference.checkpoint import SCALE_SUFFIX
from reference.config import ModelConfig
from reference.fp8 import FP8, check_scale_values
from reference.sharding import Piece

SLICE_BYTES, BATCH_BYTES, WINDOW, THREADS = 8 << 20, 32 << 20, 8, 8
COPYING = 3  # batches on their way to the device or being decoded there
_ALIGNMENT = 256


class Slice(NamedTuple):
    """`source[rows, cols]` of the checkpoint, and the row of a parameter where it goes."""

    source: str
    dtype: torch.dtype
    rows: slice
    cols: slice | None
    parameter: Tensor
    at: int

    @property
    def shape(self) -> tuple[int, ...]:
        return _lengths(span for span in (self.rows, self.cols) if span is not None)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, block_size: int) -> tuple[slice, ...]:
        """The blocks that its rows and columns touch: those of its scales, if it is float8."""
        spans = (self.rows, self.cols) if self.dtype == FP8 else ()
        return tuple(slice(span.start // block_size, -(-span.stop // block_size)) for span in spans)


class Group(NamedTuple):
    """Slices of one shape, dtype and place in their blocks, one after another from byte `start` of their batch.

    Each has scales of the shape `grid` (none: it is not float8), from byte `scales` of the batch's.
    """

    slices: list[Slice]
    start: int
    scales: int
    grid: tuple[int, ...]


class Batch(NamedTuple):
    """What is read at once: groups' values, and from byte `scales_at` on their scales."""

    groups: list[Group]
    scales_at: int
    nbytes: int


@torch.no_grad()
def load_weights(live: LiveModel, checkpoint: HFCheckpoint, config: ModelConfig, *, track: Track = untracked) -> None:
    """Fill this rank's parameters, each value rounded once to its parameter's dtype; padding is zero.

    Raises:
        ValueError: a scale or a float8 code is damaged, or a file changed; the same on all ranks. The parameters have
            been written to by then.
    """
    with together():
        batches = plan_batches(live, checkpoint, config.block_size)
        read = _read_ahead(batches, checkpoint, live.device, config.block_size)
        for batch, buffer in track(read, "load", len(batches)):
            on_device = buffer.to(live.device, non_blocking=True)
            for group in batch.groups:
                _fill(group, on_device, on_device[batch.scales_at :], config.block_size)
        _check_codes(live, checkpoint)


# ------------------------------------------------------------------------------------------------------ what to read


def plan_batches(live: LiveModel, checkpoint: HFCheckpoint, block_size: int) -> list[Batch]:
    """Everything this rank needs, as it lies in the files; padding rows are filled now. Nothing is read."""
    return _pack(_slices(live, checkpoint), block_size)


def _slices(live: LiveModel, checkpoint: HFCheckpoint) -> list[Slice]:
    found = []
    for mapping in live.registry:
        parameter, start = mapping.parameter, 0
        value = live.state[parameter.chunk, parameter.name]
        for piece in parameter.pieces:
            stop = start + piece.rows[1] - piece.rows[0]
            if piece.source is None:
                value[start:stop].zero_()
            else:
                found += _split(piece, checkpoint.tensors[piece.source].dtype, value, start)
            start = stop
    files = {file: number for number, file in enumerate(dict.fromkeys(i.file for i in checkpoint.tensors.values()))}

    def position(part: Slice) -> tuple[int, int, int]:
        info = checkpoint.tensors[part.source]
        return files[info.file], info.offset, part.rows.start

    return sorted(found, key=position)


def _split(piece: Piece, dtype: torch.dtype, value: Tensor, at: int) -> Iterator[Slice]:
    """A piece in runs of rows of at most `SLICE_BYTES`."""
    assert piece.source is not None
    (first, last), cols = piece.rows, None if piece.cols is None else slice(*piece.cols)
    width = 1 if cols is None else cols.stop - cols.start
    step = max(1, SLICE_BYTES // (width * dtype.itemsize))
    for start in range(first, last, step):
        yield Slice(piece.source, dtype, slice(start, min(start + step, last)), cols, value, at + start - first)


def _pack(slices: Iterable[Slice], block_size: int) -> list[Batch]:
    """Slices in batches of at most `BATCH_BYTES` (or of one slice)."""
    taken: list[list[Slice]] = []
    end = BATCH_BYTES
    for part in slices:
        needed = _aligned(part.nbytes) + _scale_bytes(_lengths(part.blocks(block_size)))
        if end + needed > BATCH_BYTES:
            taken.append([])
            end = 0
        taken[-1].append(part)
        end += needed
    return [_batch(parts, block_size) for parts in taken]


def _batch(slices: list[Slice], block_size: int) -> Batch:
    alike: dict[tuple, list[Slice]] = {}
    for part in slices:
        blocks = part.blocks(block_size)
        offsets = [span.start % block_size for span in (part.rows, part.cols)] if blocks else []
        alike.setdefault((_lengths(blocks), part.dtype, part.shape, part.parameter.dtype, *offsets), []).append(part)
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


# ------------------------------------------------------------------------------------------- reading ahead of decoding


def _read_ahead(
    batches: list[Batch], checkpoint: HFCheckpoint, device: torch.device, block_size: int
) -> Iterator[tuple[Batch, Tensor]]:
    on_gpu = device.type == "cuda"
    # Always one size, so that torch's allocator of pinned memory hands the same few buffers out again.
    largest = max((batch.nbytes for batch in batches), default=0)

    def read(batch: Batch) -> Tensor:
        whole = torch.empty(largest if on_gpu else batch.nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        buffer = whole[: batch.nbytes]
        checkpoint.read_into(_reads(batch, buffer.numpy(), block_size))
        if not fp8.valid_scales(buffer[batch.scales_at :].view(torch.float32)):
            for name in dict.fromkeys(part.source for group in batch.groups if group.grid for part in group.slices):
                check_scale_values(checkpoint.read(name + SCALE_SUFFIX), name=name)
        return buffer

    threads = min(THREADS, os.cpu_count() or 1)
    use_device = {"initializer": torch.cuda.set_device, "initargs": (device,)} if on_gpu else {}
    with ThreadPoolExecutor(threads, thread_name_prefix="read", **use_device) as pool:
        ahead = deque(pool.submit(read, batch) for batch in batches[:WINDOW])
        copying: deque[torch.cuda.Event] = deque()
        try:
            for i, batch in enumerate(batches):
                buffer = ahead.popleft().result()
                if i + WINDOW < len(batches):
                    ahead.append(pool.submit(read, batches[i + WINDOW]))
                yield batch, buffer
                del buffer
                if on_gpu:  # else a slow device would have pinned memory grow
                    copying.append(torch.cuda.Event())
                    copying[-1].record()
                    if len(copying) == COPYING:
                        copying.popleft().synchronize()
        finally:
            for future in ahead:
                future.cancel()
            live_reads.release()


def _reads(batch: Batch, buffer: np.ndarray, block_size: int) -> Iterator[tuple[np.ndarray, str, slice, slice | None]]:
    """Which bytes of a batch's buffer each slice, and its scales, are read into."""
    for group in batch.groups:
        nbytes, scales = group.slices[0].nbytes, _scale_bytes(group.grid)
        at, scales_at = group.start, batch.scales_at + group.scales
        for part in group.slices:
            yield buffer[at : at + nbytes], part.source, part.rows, part.cols
            at += nbytes
            if group.grid:
                yield buffer[scales_at : scales_at + scales], part.source + SCALE_SUFFIX, *part.blocks(block_size)
                scales_at += scales


# ------------------------------------------------------------------------------------------------------------ decoding


def _fill(group: Group, buffer: Tensor, scales: Tensor, block_size: int) -> None:
    parts, first = group.slices, group.slices[0]
    values = buffer[group.start : group.start + len(parts) * first.nbytes].view(first.dtype).view(-1, *first.shape)
    scales = scales[group.scales : group.scales + len(parts) * _scale_bytes(group.grid)].view(torch.float32)
    targets = [part.parameter.detach()[part.at : part.at + first.shape[0]] for part in parts]
    if not group.grid:
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
        return
    assert first.cols is not None
    fp8.dequantize_blockwise(
        values,
        scales.view(-1, *group.grid),
        block_size=block_size,
        dtype=targets[0].dtype,
        out=targets,
        row_offset=first.rows.start % block_size,
        col_offset=first.cols.start % block_size,
        check_values=False,
        name=first.source,
    )


def _check_codes(live: LiveModel, checkpoint: HFCheckpoint) -> None:
    """No float8 code was NaN: the greatest value of a parameter is NaN if one of them is.

    Raises:
        ValueError: one was; names the tensor and the position.
    """
    quantized = [
        mapping.parameter
        for mapping in live.registry
        if any(checkpoint.tensors[source].dtype == FP8 for source in mapping.hf_params)
    ]
    if not quantized:
        return
    greatest = torch.stack([live.state[p.chunk, p.name].amax().float() for p in quantized])
    for index in greatest.isnan().nonzero().flatten().tolist():
        parameter, start = quantized[index], 0
        for piece in parameter.pieces:
            value = live.state[parameter.chunk, parameter.name][start : start + piece.rows[1] - piece.rows[0]]
            start += len(value)
            bad = value.isnan()
            if bad.any():
                row, col = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"{piece.source}: float8 code at {[piece.rows[0] + row, (piece.cols or (0,))[0] + col]} is NaN, "
                    "expected finite values; the checkpoint is damaged, fetch the file again"
                )
