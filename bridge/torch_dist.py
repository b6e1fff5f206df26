"""megatron-core distributed checkpoints (`torch_dist`) on disk, piece by piece, without a model or process group.

torch.distributed.checkpoint's own writer and reader do the work; the planners here hand it one tensor at a time, made
or consumed when its turn comes, so that memory holds about two. A checkpoint has, besides the tensors of
`reference.dist_checkpoint`, what megatron-core expects to find: an empty extra state for every module of Transformer
Engine that has one (the local spec's are a subset), and the common state with the training arguments.

A folder as Megatron-LM knows it: `latest_checkpointed_iteration.txt` names `iter_{i:07d}`, which holds `.metadata`,
`metadata.json` and `*.distcp` files.
"""

import io
import json
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from bridge.staging import write_bytes
from reference.config import ModelConfig

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT_NAME = "metadata.json"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_STATE = "common_state/shard_0_1"

# Modules with an extra state in megatron-core's Transformer Engine spec (seen, 0.19.2 with Transformer Engine 2.20).
EXTRA_STATES_OF_A_LAYER = ("self_attention.linear_proj", "self_attention.linear_qkv", "pre_mlp_layernorm")
EXTRA_STATES_OF_AN_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
EXTRA_STATES_OF_THE_MODEL = ("decoder.final_layernorm",)


class Chunk(NamedTuple):
    """A rectangle of the tensor `key`: where it starts, its shape (as many axes as the tensor), the tensor's own."""

    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Stored(NamedTuple):
    """Where a chunk (or, without `start`, an object) lies: a span of bytes in a file."""

    key: str
    start: tuple[int, ...] | None
    file: str
    offset: int
    nbytes: int


# ------------------------------------------------------------------------------------------------------------- writing


class _Writer(FileSystemWriter):
    """Writes one item after the other, and the same bytes on every run: torch's notes a random id and the folder."""

    def __init__(self, folder: Path):
        super().__init__(folder, per_thread_copy_ahead=0)

    def storage_meta(self) -> StorageMeta | None:
        return None


class _LazyPlanner(DefaultSavePlanner):
    """Makes what is to be written when it is written."""

    def __init__(self, make: dict[MetadataIndex, Callable[[], Tensor | io.BytesIO]]):
        super().__init__()
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._make[write_item.index]()


def write_chunks(folder: Path, unit: int, chunks: Iterable[tuple[Chunk, Callable[[], Tensor]]]) -> list[Stored]:
    """Write one file, `__{unit}_0.distcp`, of chunks whose values are made one at a time."""
    items, make = [], {}
    for chunk, value in chunks:
        index = MetadataIndex(chunk.key, torch.Size(chunk.start))
        data = TensorWriteData(_region(chunk), _properties(chunk), torch.Size(chunk.whole))
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        make[index] = lambda chunk=chunk, value=value: value().view(chunk.shape)
    return _write(folder, unit, items, make)


def write_states(folder: Path, unit: int, config: ModelConfig, common: dict[str, Any]) -> list[Stored]:
    """Write the file with the extra states and the common state."""
    extra, state = _serialized([torch.empty(0, dtype=torch.uint8)]), _serialized([common])
    make = {MetadataIndex(key): lambda: io.BytesIO(extra) for key in extra_state_keys(config)}
    make[MetadataIndex(COMMON_STATE)] = lambda: io.BytesIO(state)
    return _write(folder, unit, [WriteItem(index, WriteItemType.BYTE_IO) for index in make], make)


def finish(folder: Path, chunks: Iterable[Chunk], stored: Iterable[Stored]) -> None:
    """Write `metadata.json` and `.metadata`: from here on the folder is a checkpoint.

    pickle writes one string once and equal strings twice, so these are interned: units done by this process, by a
    worker and by an earlier run give the same bytes.
    """
    write_bytes(folder / FORMAT_NAME, json.dumps(FORMAT).encode())
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for chunk in chunks:
        empty = TensorStorageMetadata(_properties(chunk), torch.Size(chunk.whole), [])
        entries.setdefault(intern(chunk.key), empty).chunks.append(_region(chunk))
    results = []
    for key, start, file, offset, nbytes in stored:
        key, file = intern(key), intern(file)
        entries.setdefault(key, BytesStorageMetadata())
        index = MetadataIndex(key, None if start is None else torch.Size(start))
        results.append(WriteResult(index, nbytes, _StorageInfo(file, offset, nbytes)))
    _Writer(folder).finish(Metadata(entries), [results])


def extra_state_keys(config: ModelConfig) -> Iterator[str]:
    """The keys of all extra states: `{module}._extra_state/shard_{index}_{sizes}`."""
    layers, experts = config.num_hidden_layers, config.num_local_experts
    for layer in range(layers):
        for module in EXTRA_STATES_OF_A_LAYER:
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for module in EXTRA_STATES_OF_AN_EXPERT:
            for expert in range(experts):
                yield f"decoder.layers.{module}._extra_state/shard_{layer}.{expert}_{layers}.{experts}"
    for module in EXTRA_STATES_OF_THE_MODEL:
        yield f"{module}._extra_state/shard_0_1"


def _write(folder: Path, unit: int, items: list[WriteItem], make: dict) -> list[Stored]:
    plan = SavePlan(items, storage_data=_StoragePrefix(f"__{unit}_"))
    try:
        results = _Writer(folder).write_data(plan, _LazyPlanner(make)).value()
    except RuntimeError as error:  # what torch's archive says of the bytes it could not write
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    stored = []
    for result in results:
        start, info = result.index.offset, result.storage_data
        at = None if start is None else tuple(start)
        stored.append(Stored(result.index.fqn, at, info.relative_path, info.offset, info.length))
    return stored


def _region(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.shape))


def _properties(chunk: Chunk) -> TensorProperties:
    return TensorProperties(dtype=chunk.dtype)


def _serialized(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- reading


class _IntoPlanner(DefaultLoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, out: Tensor):
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._out
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class TorchDistCheckpoint:
    """A distributed checkpoint: shapes and dtypes of its tensors, and any rectangle of them.

    `path` is Megatron-LM's folder (the iteration that its tracker names is read) or one iteration's.

    Raises:
        ValueError: no `torch_dist` checkpoint is there, or its metadata cannot be read.
    """

    def __init__(self, path: Path | str):
        self.folder = iteration_folder(Path(path))
        self._reader = FileSystemReader(self.folder)
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            self._entries = dict(metadata.state_dict_metadata)
            self._tensors = {
                key: entry for key, entry in self._entries.items() if isinstance(entry, TensorStorageMetadata)
            }
            self._chunks = {key: _by_index(entry) for key, entry in self._tensors.items()}
            self.shapes = {key: tuple(torch.Size(entry.size)) for key, entry in self._tensors.items()}
            files = {".metadata", *(info.relative_path for info in metadata.storage_data.values())}
            self._versions = {file: _version(self.folder / file) for file in sorted(files)}
        except Exception as error:  # unpickling damaged bytes can raise anything, and so can what comes of it
            raise ValueError(
                f"{self.folder}/.metadata: cannot be read ({_first_line(error)}); save the checkpoint again"
            ) from error
        missing = next((file for file, version in self._versions.items() if version is None), None)
        if missing is not None:
            raise ValueError(f"{self.folder / missing}: .metadata names this file and it is not there; copy it again")

    @property
    def versions(self) -> tuple[tuple[str, int, int], ...]:
        """(file, bytes, mtime_ns) of each file at opening."""
        return tuple((file, *version) for file, version in self._versions.items() if version)

    def nbytes(self, key: str) -> int:
        """Of one tensor."""
        return math.prod(self.shapes[key]) * self.dtype(key).itemsize

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The rectangle of `key` that begins at `start`, with all of its axes.

        Raises:
            ValueError: the stored chunks do not cover it, or a file is damaged or missing.
        """
        entry, files = self._tensors[key], set()
        try:
            out = torch.empty(shape, dtype=entry.properties.dtype)
            region = ChunkStorageMetadata(torch.Size(start), torch.Size(shape))
            chunks = self._chunks[key]
            leading = len(next(iter(chunks), ()))
            one = all(size == 1 for size in shape[:leading])  # else every chunk has one row, and more are wanted
            near = chunks.get(start[:leading], []) if one else entry.chunks
            items = create_read_items_for_chunk_list(key, replace(entry, chunks=near), [region])
            files = {self._reader.storage_data[item.storage_index].relative_path for item in items}
            covered = sum(item.lengths.numel() for item in items)
            self._reader.read_data(LoadPlan(items), _IntoPlanner(out)).wait()
        except Exception as error:  # as above
            self._check_unchanged(key, files)
            where = ", ".join(sorted(files)) or ".metadata"
            raise ValueError(
                f"{self.folder}: {key} cannot be read from {where} ({_first_line(error)}); the checkpoint is damaged"
            ) from error
        self._check_unchanged(key, files)
        if covered != out.numel():
            raise ValueError(f"{self.folder}: the chunks of {key} do not cover {list(shape)} from {list(start)}")
        return out

    def _check_unchanged(self, key: str, files: set[str]) -> None:
        for file in sorted(files):
            if _version(self.folder / file) != self._versions[file]:
                raise ValueError(f"{self.folder / file}: changed while {key} was read; open the checkpoint again")

    def common(self) -> dict[str, Any]:
        """The common state: training arguments and iteration, from inside the checkpoint or from `common.pt`."""
        legacy = self.folder / "common.pt"
        with torch.serialization.safe_globals([Namespace]):
            if legacy.is_file():
                return torch.load(legacy, weights_only=True)
            if COMMON_STATE not in self._entries:
                return {}
            info = self._reader.storage_data[MetadataIndex(COMMON_STATE)]
            with (self.folder / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                return torch.load(io.BytesIO(file.read(info.length)), weights_only=True)[0]


def _first_line(error: Exception) -> str:
    """torch's errors go on to advise the caller of torch.load."""
    return str(error).partition("\n")[0] or type(error).__name__


def _by_index(entry: TensorStorageMetadata) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
    """The chunks by their place along the leading axes that every chunk has one of: layers, experts."""
    leading = 0
    while leading < len(entry.size) - 1 and all(chunk.sizes[leading] == 1 for chunk in entry.chunks):
        leading += 1
    found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
    for chunk in entry.chunks:
        found.setdefault(tuple(chunk.offsets[:leading]), []).append(chunk)
    return found


def _version(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns


def iteration_folder(path: Path) -> Path:
    """The folder with `.metadata`: `path` itself, or the iteration that its tracker file names.

    Raises:
        ValueError: neither; says what is there.
    """
    if (path / ".metadata").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise ValueError(
            f"{path}: neither .metadata nor {TRACKER} is there; give the folder of a torch_dist checkpoint"
        )
    text = tracker.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,12}|release", text):
        raise ValueError(f"{tracker}: found {text[:40]!r}, expected an iteration or 'release'")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder}: {TRACKER} names this iteration and it has no .metadata; the save was not finished")
    return folder
