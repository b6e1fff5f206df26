"""A distributed checkpoint's `.metadata`: read without running any of it, and true before it is used.

torch.distributed.checkpoint pickles its `Metadata` there, and reads it with `pickle.load`, which runs whatever the file
says. Here it is read as data (`bridge.torch_dist.unpickle`), by the names of `metadata_classes`. What it says is then
held against the folder: every span lies in a regular file of it, no byte is claimed twice, and the chunks of a tensor
fit into it, do not overlap and together cover it. So nothing can be asked of the checkpoint that takes more memory than
its files have bytes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bridge.huggingface.regular_files import file_inside, stays_inside
from bridge.torch_dist.metadata_classes import KNOWN, whole_numbers
from bridge.torch_dist.unpickle import Items, Record, unpickle

METADATA_NAME = ".metadata"
MOST_BYTES = 2**30  # 100 times what a MiniMax-M2 of full size has


class Span(NamedTuple):
    """`nbytes` of a file from `offset` on: where torch.save's archive of a chunk or an object lies."""

    file: str
    offset: int
    nbytes: int


class StoredChunk(NamedTuple):
    """A rectangle of a tensor: where it begins, its shape, and where its values lie."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    span: Span


class StoredTensor(NamedTuple):
    """A tensor, and the chunks that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[StoredChunk]


class Metadata(NamedTuple):
    """What a checkpoint holds, by key, and (bytes, mtime_ns) of each of its files."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, Span]
    files: dict[str, tuple[int, int]]


def read_metadata(folder: Path) -> Metadata:
    """Read and check a checkpoint's metadata.

    Raises:
        ValueError: it is damaged, names a class that does not belong there, or says what is not true of the folder;
            names the key or file, what was found and what was expected.
    """
    path, stat = folder / METADATA_NAME, file_inside(folder, METADATA_NAME)
    if stat.st_size > MOST_BYTES:
        raise ValueError(
            f"{path}: found {stat.st_size} bytes, expected at most {MOST_BYTES}; save the checkpoint again"
        )
    try:
        root = _Fields(unpickle(path.read_bytes(), KNOWN), "Metadata")
        spans = _spans(root)
        entries = root.items("state_dict_metadata")
        tensors = {key: _tensor(key, entry, spans) for key, entry in entries if entry.kind == "TensorStorageMetadata"}
    except ValueError as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); it is not what torch and megatron-core write: save the checkpoint "
            "again, and let no other tool load this one"
        ) from error
    objects = {key: spans[key, None] for key, entry in entries if (key, None) in spans and key not in tensors}
    files = {span.file: (0, 0) for span in spans.values()}
    for file in sorted(files):
        found = file_inside(folder, file, named_by=METADATA_NAME)
        files[file] = found.st_size, found.st_mtime_ns
    _check_spans(folder, spans, files)
    for key, tensor in tensors.items():
        _check_chunks(folder, key, tensor)
    return Metadata(tensors, objects, files | {METADATA_NAME: (stat.st_size, stat.st_mtime_ns)})


# --------------------------------------------------------------------------------------------------------- what it says


_ENTRIES = ("TensorStorageMetadata", "BytesStorageMetadata")


class _Fields:
    """The attributes of one record, each with its type."""

    def __init__(self, record: Any, kind: str):
        if not isinstance(record, Record) or record.kind != kind or not isinstance(record.state, dict):
            raise ValueError(f"found {_kind(record)}, expected a {kind}")
        self._kind, self._state = kind, record.state

    def get(self, name: str, *types: type) -> Any:
        value = self._state.get(name)
        if type(value) not in types:
            expected = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{self._kind}.{name}: found {_kind(value)}, expected {expected}")
        return value

    def items(self, name: str) -> list[tuple[str, Record]]:
        """A dictionary from keys to records."""
        pairs = self.get(name, Items)
        for key, value in pairs:
            if type(key) is not str or not isinstance(value, Record) or value.kind not in _ENTRIES:
                raise ValueError(f"{self._kind}.{name}: found {_kind(key)}: {_kind(value)}, expected names of entries")
        return pairs


def _kind(value: Any) -> str:
    """For messages: never what a value holds, which may be endless."""
    return f"a {value.kind if isinstance(value, Record) else type(value).__name__}"


def _spans(root: _Fields) -> dict[tuple[str, tuple[int, ...] | None], Span]:
    """Where everything lies, by key and, for a chunk, where it begins."""
    spans: dict[tuple[str, tuple[int, ...] | None], Span] = {}
    for index, info in root.get("storage_data", Items):
        at, where = _Fields(index, "MetadataIndex"), _Fields(info, "_StorageInfo")
        key, start = at.get("fqn", str), at.get("offset", tuple, type(None))
        if start is not None:
            start = whole_numbers(key, start)
        if where.get("transform_descriptors", list, tuple, type(None)):
            raise ValueError(f"{key}: is stored compressed or encrypted, which is not read here")
        file = where.get("relative_path", str)
        if not stays_inside(file):
            raise ValueError(f"{key}: is said to lie in {file!r}, expected a file inside the checkpoint's folder")
        spans[key, start] = Span(file, where.get("offset", int), where.get("length", int))
    return spans


def _tensor(key: str, entry: Record, spans: dict[tuple[str, tuple[int, ...] | None], Span]) -> StoredTensor:
    fields = _Fields(entry, "TensorStorageMetadata")
    properties, chunks = fields.get("properties", Record), []
    state = properties.state if properties.kind == "TensorProperties" else None
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[0], torch.dtype):
        raise ValueError(f"{key}: found {_kind(properties)} without a dtype, expected torch's TensorProperties")
    for part in fields.get("chunks", list):
        chunk = _Fields(part, "ChunkStorageMetadata")
        start, shape = (whole_numbers(key, chunk.get(name, tuple)) for name in ("offsets", "sizes"))
        if 0 in shape:
            continue  # a rank that holds nothing of it
        if (key, start) not in spans:
            raise ValueError(f"{key}: a chunk begins at {list(start)} and is stored nowhere")
        chunks.append(StoredChunk(start, shape, spans[key, start]))
    return StoredTensor(state[0], whole_numbers(key, fields.get("size", tuple)), chunks)


# ----------------------------------------------------------------------------------------------------- whether it is so


def _check_spans(folder: Path, spans: dict[Any, Span], files: dict[str, tuple[int, int]]) -> None:
    """Each lies in its file, and no two share a byte."""
    by_file: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for (key, _), (file, offset, nbytes) in spans.items():
        size, _ = files[file]
        if offset < 0 or nbytes < 0 or offset + nbytes > size:
            raise ValueError(
                f"{folder / file}: {key} is said to be {nbytes} bytes from byte {offset}, and the file has {size}; "
                "copy it again, or save the checkpoint again"
            )
        by_file[file].append((offset, offset + nbytes, key))
    for file, inside in by_file.items():
        for (_, stop, one), (start, _, other) in pairwise(sorted(inside)):
            if start < stop:
                raise ValueError(
                    f"{folder / file}: {one} and {other} are said to share the bytes from {start} to {stop}; save the "
                    "checkpoint again"
                )


def _check_chunks(folder: Path, key: str, tensor: StoredTensor) -> None:
    """They have the bytes for their values, fit into the tensor, do not overlap, and cover it."""
    shape = tensor.shape
    for chunk in tensor.chunks:
        needed = math.prod(chunk.shape) * tensor.dtype.itemsize
        if needed > chunk.span.nbytes:
            raise ValueError(
                f"{folder}: {key}: a chunk of shape {list(chunk.shape)} and {tensor.dtype} needs {needed} bytes, and "
                f"{chunk.span.file} has {chunk.span.nbytes} for it; save the checkpoint again"
            )
        if (
            len(chunk.start) != len(shape)
            or len(chunk.shape) != len(shape)
            or any(start + size > whole for start, size, whole in zip(chunk.start, chunk.shape, shape, strict=True))
        ):
            raise ValueError(
                f"{folder}: {key}: a chunk of shape {list(chunk.shape)} at {list(chunk.start)} leaves the tensor of "
                f"shape {list(shape)}; save the checkpoint again"
            )
    if pair := overlapping(tensor.chunks):
        raise ValueError(
            f"{folder}: {key}: the chunks at {list(pair[0].start)} and {list(pair[1].start)} overlap; save the "
            "checkpoint again"
        )
    if sum(math.prod(chunk.shape) for chunk in tensor.chunks) != math.prod(shape):
        raise ValueError(
            f"{folder}: the chunks of {key} do not cover {list(shape)} from {[0] * len(shape)}; save the "
            "checkpoint again"
        )


def overlapping(chunks: Iterable[StoredChunk]) -> tuple[StoredChunk, StoredChunk] | None:
    """Two chunks that share an element, if there are any.

    Chunks that a cut across one axis separates do not overlap: groups are cut apart along one axis after another, and
    only what no cut separates is compared pair by pair.
    """
    groups = [(list(chunks), 0, 0)]  # a group, the axis to cut it along, and how many axes did not cut it
    while groups:
        group, axis, tried = groups.pop()
        if len(group) < 2:
            continue
        if tried == len(group[0].shape):
            for one, other in combinations(group, 2):
                if all(
                    max(a, b) < min(a + m, b + n)
                    for a, m, b, n in zip(one.start, one.shape, other.start, other.shape, strict=True)
                ):
                    return one, other
            continue
        parts = _cut(group, axis)
        following = (axis + 1) % len(group[0].shape)
        groups += [(part, following, tried + 1 if len(parts) == 1 else 0) for part in parts]
    return None


def _cut(group: list[StoredChunk], axis: int) -> list[list[StoredChunk]]:
    """The group in parts whose spans along the axis have nothing in common."""
    parts, reached = [], 0
    for chunk in sorted(group, key=lambda chunk: chunk.start[axis]):
        if not parts or chunk.start[axis] >= reached:
            parts.append([])
        parts[-1].append(chunk)
        reached = max(reached, chunk.start[axis] + chunk.shape[axis])
    return parts
