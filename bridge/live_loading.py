"""A checkpoint into a live model: each rank reads the bytes of its own slices, and nothing else, from the files.

    files --threads--> pinned memory --one copy a batch--> device --decode--> rows of the parameter

`reference.sharding` says which rows and columns of which on-disk tensors a parameter is a stack of. They are cut into
reads of at most `READ_BYTES`, sorted as they lie in the files, and packed into batches of `BATCH_BYTES`, each float8
slice with the scales of the blocks that it touches. A few threads read batches ahead of the decoding, at most
`WINDOW` of them; float8 goes to the device as it is, and is decoded into its place there. Beyond the model a rank needs
WINDOW + 2 batches of host memory and two of the device's, whatever the model's size.

Scales are checked on the host as they are read. NaN codes become NaN weights, which one look at the finished
parameters finds: the device is waited for once.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.agreement import together
from bridge.hf_files import HFCheckpoint
from bridge.live_layout import LiveModel
from bridge.progress import Track, untracked
from compiled import fp8
from reference.checkpoint import SCALE_SUFFIX
from reference.config import ModelConfig
from reference.fp8 import FP8, check_scale_values
from reference.sharding import Piece

READ_BYTES, BATCH_BYTES, WINDOW, THREADS = 8 << 20, 32 << 20, 8, 4  # more threads wait for Python's lock
_ALIGNMENT = 256


class Slice(NamedTuple):
    """`source[rows, cols]` of the checkpoint, and the rows of a parameter that it fills."""

    source: str
    rows: slice
    cols: slice | None
    target: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        lengths = [span.stop - span.start for span in (self.rows, self.cols) if span is not None]
        return tuple(lengths)


class Read(NamedTuple):
    """A slice, and where in its batch its bytes lie: the values', and those of its scales if it has any."""

    slice: Slice
    start: int
    stop: int
    scales: "Scales | None"


class Scales(NamedTuple):
    """The scales of the blocks that a slice touches."""

    start: int
    stop: int
    rows: slice
    cols: slice


@torch.no_grad()
def load_weights(live: LiveModel, checkpoint: HFCheckpoint, config: ModelConfig, *, track: Track = untracked) -> None:
    """Fill this rank's parameters, each value rounded once to its parameter's dtype; padding is zero.

    Raises:
        ValueError: a scale or a float8 code is damaged, or a file changed; the same on all ranks. The parameters have
            been written to by then.
    """
    with together():
        block_size = config.block_size
        batches = _pack(_slices(live, checkpoint), checkpoint, block_size)
        for reads, buffer in track(_read_ahead(batches, checkpoint, live.device), "load", len(batches)):
            on_device = buffer.to(live.device, non_blocking=True)
            for read in reads:
                _fill(read, on_device, checkpoint, block_size)
        _check_codes(live, checkpoint)


# ------------------------------------------------------------------------------------------------------ what to read


def _slices(live: LiveModel, checkpoint: HFCheckpoint) -> list[Slice]:
    """Everything this rank needs, as it lies in the files; padding rows are filled now."""
    found = []
    for mapping in live.registry:
        parameter, start = mapping.parameter, 0
        value = live.state[parameter.chunk, parameter.name]
        for piece in parameter.pieces:
            target = value[start : start + piece.rows[1] - piece.rows[0]]
            start += len(target)
            if piece.source is None:
                target.zero_()
            else:
                found += _split(piece, target, checkpoint.tensors[piece.source].dtype)
    files = {file: number for number, file in enumerate(dict.fromkeys(i.file for i in checkpoint.tensors.values()))}

    def position(part: Slice) -> tuple[int, int, int]:
        info = checkpoint.tensors[part.source]
        return files[info.file], info.offset, part.rows.start

    return sorted(found, key=position)


def _split(piece: Piece, target: Tensor, dtype: torch.dtype) -> Iterator[Slice]:
    """A piece in runs of rows of at most `READ_BYTES`."""
    assert piece.source is not None
    (first, last), cols = piece.rows, None if piece.cols is None else slice(*piece.cols)
    step = max(1, READ_BYTES // max(1, target[:1].numel() * dtype.itemsize))
    for start in range(first, last, step):
        stop = min(start + step, last)
        yield Slice(piece.source, slice(start, stop), cols, target[start - first : stop - first])


def _pack(slices: Iterable[Slice], checkpoint: HFCheckpoint, block_size: int) -> list[list[Read]]:
    """Slices in batches of at most `BATCH_BYTES` (or of one slice)."""
    batches: list[list[Read]] = []
    end = BATCH_BYTES
    for part in slices:
        dtype = checkpoint.tensors[part.source].dtype
        nbytes, blocks = part.target.numel() * dtype.itemsize, None
        if dtype == FP8:
            assert part.cols is not None
            blocks = _blocks(part.rows, block_size), _blocks(part.cols, block_size)
        needed = _aligned(nbytes) + (0 if blocks is None else _aligned(_scale_bytes(*blocks)))
        if end + needed > BATCH_BYTES:
            batches.append([])
            end = 0
        at = end + _aligned(nbytes)
        scales = None if blocks is None else Scales(at, at + _scale_bytes(*blocks), *blocks)
        batches[-1].append(Read(part, end, end + nbytes, scales))
        end += needed
    return batches


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _blocks(span: slice, block_size: int) -> slice:
    """The blocks that a run of rows or columns touches."""
    return slice(span.start // block_size, -(-span.stop // block_size))


def _scale_bytes(rows: slice, cols: slice) -> int:
    return (rows.stop - rows.start) * (cols.stop - cols.start) * torch.float32.itemsize


# ------------------------------------------------------------------------------------------- reading ahead of decoding


def _read_ahead(
    batches: list[list[Read]], checkpoint: HFCheckpoint, device: torch.device
) -> Iterator[tuple[list[Read], Tensor]]:
    on_gpu = device.type == "cuda"

    def read(reads: list[Read]) -> Tensor:
        # Always one size, so that torch's allocator of pinned memory hands the same few buffers out again.
        size = max(BATCH_BYTES, _end(reads)) if on_gpu else _end(reads)
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        for part, start, stop, scales in reads:
            checkpoint.read_into(buffer[start:stop], part.source, part.rows, part.cols)
            if scales is not None:
                name = part.source + SCALE_SUFFIX
                checkpoint.read_into(buffer[scales.start : scales.stop], name, scales.rows, scales.cols)
                least, greatest = buffer[scales.start : scales.stop].view(torch.float32).aminmax()  # NaN if one is
                if not 0 < least.item() <= greatest.item() < math.inf:
                    check_scale_values(checkpoint.read(name), name=part.source)
        return buffer[: _end(reads)]

    threads = min(THREADS, os.cpu_count() or 1)
    use_device = {"initializer": torch.cuda.set_device, "initargs": (device,)} if on_gpu else {}
    with ThreadPoolExecutor(threads, thread_name_prefix="read", **use_device) as pool:
        ahead = deque(pool.submit(read, reads) for reads in batches[:WINDOW])
        try:
            for i, reads in enumerate(batches):
                buffer = ahead.popleft().result()
                if i + WINDOW < len(batches):
                    ahead.append(pool.submit(read, batches[i + WINDOW]))
                yield reads, buffer
        finally:
            for future in ahead:
                future.cancel()


def _end(reads: list[Read]) -> int:
    last = reads[-1]
    return last.stop if last.scales is None else last.scales.stop


# ------------------------------------------------------------------------------------------------------------ decoding


def _fill(read: Read, buffer: Tensor, checkpoint: HFCheckpoint, block_size: int) -> None:
    part, scales = read.slice, read.scales
    dtype = checkpoint.tensors[part.source].dtype
    values = buffer[read.start : read.stop].view(dtype).view(part.shape)
    if scales is None:
        part.target.copy_(values)
        return
    assert part.cols is not None
    grid = (scales.rows.stop - scales.rows.start, scales.cols.stop - scales.cols.start)
    fp8.dequantize_blockwise(
        values,
        buffer[scales.start : scales.stop].view(torch.float32).view(grid),
        block_size=block_size,
        dtype=part.target.dtype,
        out=part.target.detach(),
        row_offset=part.rows.start % block_size,
        col_offset=part.cols.start % block_size,
        check_values=False,
        name=part.source,
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
