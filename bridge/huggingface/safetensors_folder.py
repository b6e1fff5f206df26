"""A Hugging Face checkpoint folder, read lazily: names, dtypes and shapes at once, bytes only when asked for.

The index decides which file holds a tensor; file names decide nothing (released files are called model-000xx-of-00130
and 125 of them exist). Opening reads the headers only and refuses a folder that is not whole, so nothing is found out
half-way through 230 GB.

Bytes are read (`bridge.huggingface.scatter_read`) into memory of the tensor's or the caller's own, not through
safetensors' memory map. Tensors of a map share their pages (writing to one changes what the next read returns), a file
cut short kills the process with SIGBUS, and every page ever read counts as the process's memory.

Rows are read whole, and who needs columns cuts them out. Rows of weights here are 1536 to 6144 bytes long, pages of the
page cache 4096: reading some columns of each row would touch most pages all the same, at the cost of a read for each.
"""

import gc
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from bridge.formats import A_DISTRIBUTED_FOLDER, check_folder, check_is_itself, check_model, check_quantisation
from bridge.huggingface.read_json import read_object
from bridge.huggingface.regular_files import file_inside, regular_file, stays_inside
from bridge.huggingface.safetensors_header import TensorInfo, header_length, read_header
from bridge.huggingface.scatter_read import Read, scatter_read
from reference.stacked import View

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SINGLE_NAMES = (SINGLE_NAME, "model-00001-of-00001.safetensors")  # a whole checkpoint, without an index
SHARD_SUFFIX = ".safetensors"


class SafetensorsFolder:
    """`tensors[name]` for every name of the index, in its order, each proven to lie whole in the file the index names.

    `config_json` and `metadata` are the objects of config.json and of the index (`total_size` is there as written, and
    may be wrong; `nbytes` is counted). A folder with one file of `SINGLE_NAMES` and no index is read as well. What the
    index does not name is not read, though it may hold tensors; `notes` says what that is, a line for each kind.

    Raises: ValueError on opening, naming the file or tensor, if config.json, the index or a shard is missing or
    malformed, or if a tensor of the index is not in its file.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not os.path.lexists(self.folder / CONFIG_NAME):
            check_folder(self.folder, A_DISTRIBUTED_FOLDER)
        self._config_version = _version(file_inside(self.folder, CONFIG_NAME))
        self.config_json = read_object(self.folder / CONFIG_NAME)
        for check in (check_model, check_quantisation):
            check(self.config_json, self.folder / CONFIG_NAME)
        index_path = self.folder / INDEX_NAME
        with ExitStack() as stack, _collector_paused():
            if os.path.lexists(index_path):
                index = read_object(index_path)
                weight_map = _weight_map(index_path, index)
                files = dict.fromkeys(weight_map.values())
                self._shards = {file: stack.enter_context(_Shard(self.folder / file, file)) for file in files}
            else:
                index, single = {}, self._single_name()
                shard = stack.enter_context(_Shard(self.folder / single, single))
                weight_map = dict.fromkeys(shard.tensors, single)
                self._shards = {single: shard}
            if not weight_map:
                raise ValueError(
                    f"{self.folder}: no tensor in {', '.join(self._shards) or INDEX_NAME}; download it again"
                )
            self.tensors = _assign(weight_map, self._shards)
            self._open_files = stack.pop_all()
        self.metadata: dict[str, Any] = index.get("metadata", {})
        self.notes = _notes(self.folder, weight_map, self._shards)

    def _single_name(self) -> str:
        found = [name for name in SINGLE_NAMES if os.path.lexists(self.folder / name)]
        if not found:
            check_folder(self.folder, A_DISTRIBUTED_FOLDER)
        if len(found) != 1:
            raise ValueError(
                f"{self.folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there; download it again"
                if not found
                else f"{self.folder}: holds {' and '.join(found)} and no {INDEX_NAME}; which one is meant?"
            )
        return found[0]

    @property
    def header(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """(dtype, shape) by name."""
        return {name: (info.dtype, info.shape) for name, info in self.tensors.items()}

    def add_views(self, views: Mapping[str, View]) -> None:
        """Put the names of tensors that lie inside others into `tensors`, in the place of those that they lie in."""
        if not views:
            return
        inside: dict[str, dict[str, TensorInfo]] = {}
        for name, view in views.items():
            whole = self.tensors[view.source]
            offset = whole.offset + view.start * whole.dtype.itemsize
            inside.setdefault(view.source, {})[name] = TensorInfo(whole.dtype, view.shape, whole.file, offset)
        parts = (inside.get(name, {name: info}) for name, info in self.tensors.items())
        self.tensors = {name: info for part in parts for name, info in part.items()}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def num_files(self) -> int:
        """Number of safetensors files."""
        return len(self._shards)

    def read(self, name: str, rows: slice | None = None) -> Shaped[Tensor, "..."]:
        """The tensor, or those rows of it, bit for bit as on disk, in memory of its own.

        Raises:
            ValueError: the name is unknown, `rows` has a step or leaves the tensor, or its file changed since opening.
        """
        offset, shape = self._locate(name, rows)
        dtype = self.tensors[name].dtype
        buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device="cpu")
        self._shards[self.tensors[name].file].read([(name, Read(offset, memoryview(buffer.numpy())))])
        return buffer.view(dtype).reshape(shape)

    def read_into(self, reads: Iterable[tuple[UInt8[np.ndarray, " nbytes"], str, slice | None]]) -> None:
        """The bytes of `read(name, rows)` for each (buffer, name, rows), into memory of the caller's.

        What lies one after another in a file is read in one call. Threads may read at once.

        Raises:
            ValueError: as `read`, and if a buffer is not of that many bytes.
        """
        by_file: dict[str, list[tuple[str, Read]]] = {}
        for buffer, name, rows in reads:
            offset, shape = self._locate(name, rows)
            info = self.tensors[name]
            expected = math.prod(shape) * info.dtype.itemsize
            if buffer.nbytes != expected:
                raise ValueError(f"{name}: found a buffer of {buffer.nbytes} bytes, expected {expected}")
            by_file.setdefault(info.file, []).append((name, Read(offset, memoryview(buffer))))
        for file, of_file in by_file.items():
            self._shards[file].read(of_file)

    @property
    def versions(self) -> tuple[tuple[str, int, int], ...]:
        """(file, bytes, mtime_ns) of config.json and each shard at opening."""
        return ((CONFIG_NAME, *self._config_version), *((file, *shard.version) for file, shard in self._shards.items()))

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the files so far, headers included."""
        return sum(shard.bytes_read for shard in self._shards.values())

    def _locate(self, name: str, rows: slice | None) -> tuple[int, tuple[int, ...]]:
        """The first byte in its file, and the shape, of a tensor or of some of its rows."""
        info = self._info(name)
        if rows is None:
            return info.offset, info.shape
        start, stop = _bounds(name, info.shape, rows)
        return info.offset + start * math.prod(info.shape[1:]) * info.dtype.itemsize, (stop - start, *info.shape[1:])

    def _info(self, name: str) -> TensorInfo:
        if name in self.tensors:
            return self.tensors[name]

        def likeness(other: str) -> int:  # of one typing error; difflib takes 13 s over 96,103 names
            return _shared_start(name, other) + _shared_start(name[::-1], other[::-1])

        raise ValueError(f"{self.folder}: no tensor {name!r}; did you mean {max(self.tensors, key=likeness)!r}?")

    def close(self) -> None:
        self._open_files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Shard:
    """One open safetensors file, its header, and the size and time it had when opened."""

    def __init__(self, path: Path, file: str):
        regular_file(path, named_by="" if file == SINGLE_NAME else INDEX_NAME)
        self.path = path
        self.bytes_read, self._counting = 0, threading.Lock()
        with ExitStack() as stack:
            self._file = stack.enter_context(path.open("rb", buffering=0))
            self.version = _version(os.fstat(self._file.fileno()))
            self.tensors = self._read_header(file)
            stack.pop_all()

    def _read_header(self, file: str) -> dict[str, TensorInfo]:
        nbytes = self.version[0]
        start = self._bytes("header length", 0, min(8, nbytes))
        with self._named_errors():
            length = header_length(start, nbytes)
        header = self._bytes("header", 8, length)
        with self._named_errors():
            return read_header(header, nbytes, file)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            check_is_itself(self.path)
            raise ValueError(f"{self.path}: {error}") from error

    def _bytes(self, name: str, offset: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self.read([(name, Read(offset, memoryview(buffer)))])
        return bytes(buffer)

    def read(self, named: list[tuple[str, Read]]) -> None:
        """Fill each buffer with bytes of a tensor. Raises: ValueError if the file is not the one that was opened."""
        reads = [read for _, read in named]
        whole = scatter_read(self._file.fileno(), reads)
        try:
            now = _version(os.stat(self.path))
        except FileNotFoundError:
            now = None
        with self._counting:
            self.bytes_read += sum(read.buffer.nbytes for read in reads)
        if not whole or now != self.version:  # looked at after reading: covers a change during it
            first, *others = dict.fromkeys(name for name, _ in named)
            what = f"{first} and {len(others)} more were" if others else f"{first} was"
            raise ValueError(
                f"{self.path}: changed while {what} read: (bytes, mtime_ns) {self.version} at opening, "
                f"{now or 'gone'} now; open the checkpoint again once nothing writes to it"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Headers are 100,000 objects that refer to none of their kind; looking for cycles among them costs a third."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _version(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: expected a weight_map from tensor names to files, found {weight_map!r}")
    inside: set[str] = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and file not in inside and stays_inside(file):
            inside.add(file)
        if not isinstance(file, str) or file not in inside:
            raise ValueError(
                f"{path}: weight_map puts {name} in {file!r}, expected a file inside the checkpoint folder"
            )
    return weight_map


def _assign(weight_map: dict[str, str], shards: dict[str, _Shard]) -> dict[str, TensorInfo]:
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise ValueError(f"{shards[file].path}: {INDEX_NAME} says it holds {name}, its header does not")
    return {name: shards[file].tensors[name] for name, file in weight_map.items()}


def _notes(folder: Path, weight_map: dict[str, str], shards: dict[str, _Shard]) -> list[str]:
    """What lies in the folder and is not read."""
    others = [(name, file) for file, shard in shards.items() for name in shard.tensors if weight_map.get(name) != file]
    copies = [f"{name} in {file}" for name, file in others if name in weight_map]
    unindexed = [f"{name} in {file}" for name, file in others if name not in weight_map]
    files = sorted(path.name for path in folder.glob(f"*{SHARD_SUFFIX}") if path.name not in shards)
    kinds = {
        f"copies of tensors that {INDEX_NAME} puts into another file": copies,
        f"tensors that {INDEX_NAME} does not name": unindexed,
        "safetensors files that the checkpoint does not consist of": files,
    }
    return [_note(what, found) for what, found in kinds.items() if found]


def _note(what: str, found: list[str]) -> str:
    more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
    return f"not read: {what}: {found[0]}{more}"


def _shared_start(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _bounds(name: str, shape: tuple[int, ...], rows: slice) -> tuple[int, int]:
    if not shape:
        raise ValueError(f"{name}: shape {shape} has no rows to take {rows} of")
    start = 0 if rows.start is None else rows.start
    stop = shape[0] if rows.stop is None else rows.stop
    if rows.step not in (None, 1) or not 0 <= start <= stop <= shape[0]:
        raise ValueError(f"{name}: rows {rows} of shape {shape}, expected 0 <= start <= stop <= rows, step 1")
    return start, stop
