"""Loading a checkpoint into a running model: each rank reads the rows that its own slices are in, and nothing else.

    files --threads--> pinned memory --one copy a batch--> device --cut, decode--> rows of the parameter

`bridge.weights.read_plan` plans what is read. Rows are read and copied whole; where a slice has only some of their
columns, the decoding kernel is given a view of these.

A batch is read and copied as a whole and decoded by one kernel launch for each group of alike slices, because the
bottleneck is Python, not the bytes: each of its calls waits for the interpreter lock, which other threads hold.

A few threads read up to `WINDOW` batches ahead of the decoding. Float8 codes are copied to the device as they are, and
decoded there straight into the parameters. Beyond the model a rank needs WINDOW + COPYING batches of host memory and
COPYING batches of device memory, whatever the model's size.

Scales are checked on the host as they are read; one of 0 is legal over codes of zeros, which are looked at only then.
NaN codes become NaN weights, which are searched for in the finished parameters: so the host waits for the device once.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.safetensors_folder import SafetensorsFolder
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import raise_on_all_ranks
from bridge.weights.read_plan import Batch, Group, plan_batches
from bridge.weights.sharded_model import ShardedModel
from compiled import fp8
from reference.checkpoint import SCALE_SUFFIX
from reference.fp8 import FP8, check_scale_values, float32_scales, zero_blocks

WINDOW, THREADS = 8, 8
COPYING = 3  # batches on their way to the device or being decoded there


@torch.no_grad()
def load_weights(sharded: ShardedModel, checkpoint: HuggingFaceCheckpoint, *, progress: Progress = no_progress) -> None:
    """Fill this rank's parameters, each value rounded once to its parameter's dtype; padding is zero.

    Raises:
        ValueError: a scale or a float8 code is damaged, or a file changed. All ranks raise the same error; by then
            parameters may have been overwritten.
    """
    with raise_on_all_ranks():
        files, block_size = checkpoint.files, checkpoint.config.block_size
        batches = plan_batches(sharded, files, block_size)
        read = _read_ahead(batches, files, block_size, sharded.device)
        for batch, buffer in progress(read, "load", len(batches)):
            on_device = buffer.to(sharded.device, non_blocking=True)
            for group in batch.groups:
                _fill(batch, group, on_device, block_size)
        _check_codes(sharded, files)


# ------------------------------------------------------------------------------------------- reading ahead of decoding


def _read_ahead(
    batches: list[Batch], files: SafetensorsFolder, block_size: int, device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    on_gpu = device.type == "cuda"
    # Always the same size, so that torch's allocator of pinned memory hands out the same few buffers again.
    largest = max((batch.nbytes for batch in batches), default=0)

    def read(batch: Batch) -> Tensor:
        whole = torch.empty(largest if on_gpu else batch.nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        buffer = whole[: batch.nbytes]
        files.read_into(_reads(batch, buffer.numpy()))
        for group in batch.groups:
            if group.slices[0].grid and not fp8.valid_scales(_scales(batch, group, buffer)):
                _check_scales(group, files, block_size)
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
                if on_gpu:  # without this wait, pinned memory would grow where the device is slow
                    copying.append(torch.cuda.Event())
                    copying[-1].record()
                    if len(copying) == COPYING:
                        copying.popleft().synchronize()
        finally:
            for future in ahead:
                future.cancel()


def _reads(batch: Batch, buffer: np.ndarray) -> Iterator[tuple[np.ndarray, str, slice]]:
    """The rows of each slice, and the scales of their blocks, with the bytes of the buffer that they are read into."""
    for group in batch.groups:
        nbytes, scale_bytes = group.slices[0].nbytes, group.slices[0].scale_bytes
        at, scales_at = group.start, batch.scales_at + group.scales
        for part in group.slices:
            yield buffer[at : at + nbytes], part.source, part.rows
            at += nbytes
            if part.grid:
                yield buffer[scales_at : scales_at + scale_bytes], part.source + SCALE_SUFFIX, part.blocks[0]
                scales_at += scale_bytes


def _scales(batch: Batch, group: Group, buffer: Tensor) -> Tensor:
    """The scales of a group's slices, [slices, *grid], in float32: a view of the buffer if they are stored so."""
    first, start = group.slices[0], batch.scales_at + group.scales
    assert first.scale_dtype is not None  # it has a grid of scales
    stored = buffer[start : start + len(group.slices) * first.scale_bytes].view(first.scale_dtype)
    return float32_scales(stored, name=first.source).view(-1, *first.grid)


def _check_scales(group: Group, files: SafetensorsFolder, block_size: int) -> None:
    """Check a group that has scales of 0 or worse, whole weights at a time, so that errors say where in the weight."""
    for name in dict.fromkeys(part.source for part in group.slices):
        scale_inv = float32_scales(files.read(name + SCALE_SUFFIX), name=name)
        if not fp8.valid_scales(scale_inv):
            check_scale_values(scale_inv, zero_blocks(files.read(name), block_size=block_size), name=name)


# ------------------------------------------------------------------------------------------------------------ decoding


def _fill(batch: Batch, group: Group, buffer: Tensor, block_size: int) -> None:
    parts, first = group.slices, group.slices[0]
    values = buffer[group.start : group.start + len(parts) * first.nbytes].view(first.dtype).view(-1, *first.shape)
    if first.cols is not None:
        values = values[..., first.cols]
    targets = [part.parameter.detach()[part.at : part.at + first.shape[0]] for part in parts]
    if not first.grid:
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
        return
    row_offset, col_offset = first.offsets
    fp8.dequantize_blockwise(
        values,
        _scales(batch, group, buffer)[..., first.blocks[1]],
        block_size=block_size,
        dtype=targets[0].dtype,
        out=targets,
        row_offset=row_offset,
        col_offset=col_offset,
        check_values=False,
        name=first.source,
    )


def _check_codes(sharded: ShardedModel, files: SafetensorsFolder) -> None:
    """Search the parameters that were float8 for NaN: a parameter's greatest value is NaN if any of its values is.

    Raises:
        ValueError: a code was NaN; names the tensor and the position.
    """
    quantized = [
        mapping.parameter
        for mapping in sharded.registry
        if any(files.tensors[source].dtype == FP8 for source in mapping.hf_params)
    ]
    if not quantized:
        return
    greatest = torch.stack([sharded.state[p.chunk, p.name].amax().float() for p in quantized])
    for index in greatest.isnan().nonzero().flatten().tolist():
        parameter, start = quantized[index], 0
        for piece in parameter.pieces:
            value = sharded.state[parameter.chunk, parameter.name][start : start + piece.rows[1] - piece.rows[0]]
            start += len(value)
            bad = value.isnan()
            if bad.any():
                row, col = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"{piece.source}: float8 code at {[piece.rows[0] + row, (piece.cols or (0,))[0] + col]} is NaN, "
                    "expected finite values; the checkpoint is damaged, fetch the file again"
                )
