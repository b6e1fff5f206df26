"""Reading megatron-core's distributed checkpoint (`torch_dist`), any rectangle of any tensor, without a model.

torch.distributed.checkpoint's own reader does the work; the planner here takes one tensor at a time.

A folder as Megatron-LM knows it: `latest_checkpointed_iteration.txt` names `iter_{i:07d}`, which holds `.metadata`,
`metadata.json` and `*.distcp` files.
"""

import io
import math
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bridge.torch_dist.writer import COMMON_STATE

TRACKER = "latest_checkpointed_iteration.txt"


# ------------------------------------------------------------------------------------------------------------- writing


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


class TorchDistFolder:
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
