"""Reading megatron-core's distributed checkpoint (`torch_dist`), any rectangle of any tensor, without a model.

A folder as Megatron-LM knows it: `latest_checkpointed_iteration.txt` names `iter_{i:07d}`, which holds `.metadata`,
`metadata.json` and `*.distcp` files. `bridge.torch_dist.metadata` says where each chunk of a tensor lies; a chunk is an
archive of torch.save, which is loaded as weights only, uncompressed, and has the dtype and shape that it should.
"""

import errno
import io
import math
import os
import pickle
import re
from argparse import Namespace
from collections.abc import Buffer
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from bridge.formats import A_HUGGING_FACE_FOLDER, check_folder
from bridge.huggingface.regular_files import file_inside, regular_file
from bridge.torch_dist.metadata import METADATA_NAME, Span, StoredChunk, StoredTensor, read_metadata
from bridge.torch_dist.writer import COMMON_STATE

TRACKER = "latest_checkpointed_iteration.txt"
LEGACY_COMMON_STATE = "common.pt"


class TorchDistFolder:
    """A distributed checkpoint: shapes and dtypes of its tensors, and any rectangle of them.

    `path` is Megatron-LM's folder (the iteration that its tracker names is read) or one iteration's.

    Raises:
        ValueError: no `torch_dist` checkpoint is there, or its metadata cannot be read or is not true of its files.
    """

    def __init__(self, path: Path | str):
        self.folder = iteration_folder(Path(path))
        self._metadata = read_metadata(self.folder)
        self.shapes = {key: tensor.shape for key, tensor in self._metadata.tensors.items()}
        self._chunks = {key: _by_index(tensor) for key, tensor in self._metadata.tensors.items()}

    @property
    def versions(self) -> tuple[tuple[str, int, int], ...]:
        """(file, bytes, mtime_ns) of each file at opening."""
        return tuple((file, *version) for file, version in sorted(self._metadata.files.items()))

    def nbytes(self, key: str) -> int:
        """Of one tensor."""
        return math.prod(self.shapes[key]) * self.dtype(key).itemsize

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor."""
        return self._metadata.tensors[key].dtype

    def read(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The rectangle of `key` that begins at `start`, with all of its axes.

        Raises:
            ValueError: the stored chunks do not cover it, or a file is damaged or missing.
        """
        near = [(chunk, _overlap(chunk, start, shape)) for chunk in self._near(key, start, shape)]
        found = [(chunk, overlap) for chunk, overlap in near if overlap is not None]
        if sum(math.prod(b - a for a, b in overlap) for _, overlap in found) != math.prod(shape):
            raise ValueError(f"{self.folder}: the chunks of {key} do not cover {list(shape)} from {list(start)}")
        out = torch.empty(shape, dtype=self.dtype(key))
        files = {chunk.span.file for chunk, _ in found}
        try:
            for chunk, overlap in found:
                value = self._load_chunk(chunk, out.dtype)
                out[_within(start, overlap)] = value[_within(chunk.start, overlap)]
        except Exception as error:  # reading damaged bytes can raise anything
            self._check_unchanged(key, files)
            raise ValueError(
                f"{self.folder}: {key} cannot be read from {', '.join(sorted(files))} ({_reason(error)}); the "
                "checkpoint is damaged"
            ) from error
        self._check_unchanged(key, files)
        return out

    def _near(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> list[StoredChunk]:
        """The chunks that may hold some of a rectangle: those of one layer and expert, where only that is asked for."""
        chunks = self._chunks[key]
        leading = len(next(iter(chunks), ()))
        if all(size == 1 for size in shape[:leading]):
            return chunks.get(start[:leading], [])
        return self._metadata.tensors[key].chunks

    def _load_chunk(self, chunk: StoredChunk, dtype: torch.dtype) -> Tensor:
        value = self._load(chunk.span)
        plain = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        if not plain or (value.dtype, tuple(value.shape)) != (dtype, chunk.shape):
            what = f"{value.dtype} {list(value.shape)}" if plain else "no plain tensor"
            raise ValueError(f"found {what} at {list(chunk.start)}, and .metadata says {dtype} {list(chunk.shape)}")
        return value.detach()

    def _load(self, span: Span) -> Any:
        """What torch.save wrote into a span of a file."""
        with (self.folder / span.file).open("rb") as file:
            archive = _View(file.fileno(), span.offset, span.nbytes)
            with ZipFile(archive) as members:
                unpacked = sum(member.file_size for member in members.infolist())
            if unpacked > span.nbytes:
                raise ValueError(
                    f"{span.nbytes} bytes that unpack to {unpacked}, expected an archive as torch saves it"
                )
            archive.seek(0)
            # torch declares an IO[bytes], and calls nothing that io.RawIOBase does not have
            return torch.load(archive, map_location="cpu", weights_only=True)  # pyright: ignore[reportArgumentType]

    def _check_unchanged(self, key: str, files: set[str]) -> None:
        for file in sorted(files):
            if _version(self.folder / file) != self._metadata.files[file]:
                raise ValueError(f"{self.folder / file}: changed while {key} was read; open the checkpoint again")

    def common(self) -> dict[str, Any]:
        """The common state: training arguments and iteration, from inside the checkpoint or from `common.pt`.

        Raises:
            ValueError: it is damaged, or holds objects of classes other than torch's and `argparse.Namespace`.
        """
        if os.path.lexists(self.folder / LEGACY_COMMON_STATE):
            span = Span(LEGACY_COMMON_STATE, 0, file_inside(self.folder, LEGACY_COMMON_STATE).st_size)
        elif COMMON_STATE in self._metadata.objects:
            span = self._metadata.objects[COMMON_STATE]
        else:
            return {}
        try:
            with torch.serialization.safe_globals([Namespace]):
                state = self._load(span)
        except Exception as error:  # as above
            raise ValueError(
                f"{self.folder / span.file}: the common state cannot be read ({_reason(error)}); save the "
                "checkpoint again"
            ) from error
        return state if span.file == LEGACY_COMMON_STATE else state[0]


class _View(io.RawIOBase):
    """Some bytes of an open file, as a file of their own."""

    def __init__(self, file: int, offset: int, nbytes: int):
        self._file, self._offset, self._nbytes, self._at = file, offset, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "before the first byte")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        """All that fits and is there: who reads a plain file is used to that."""
        view = memoryview(buffer).cast("B")[: max(0, self._nbytes - self._at)]
        done = 0
        while done < len(view) and (count := os.preadv(self._file, [view[done:]], self._offset + self._at + done)):
            done += count
        self._at += done
        return done


def _reason(error: Exception) -> str:
    """What torch says, without its advice to the caller of torch.load, which is to run what the file names."""
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"\bGLOBAL (\S+)", str(error))
        return f"names {named[1]}, which is no part of a tensor" if named else "holds something other than tensors"
    return str(error).partition("\n")[0] or type(error).__name__


def _by_index(tensor: StoredTensor) -> dict[tuple[int, ...], list[StoredChunk]]:
    """The chunks by their place along the leading axes that every chunk has one of: layers, experts."""
    leading = 0
    while leading < len(tensor.shape) - 1 and all(chunk.shape[leading] == 1 for chunk in tensor.chunks):
        leading += 1
    found: dict[tuple[int, ...], list[StoredChunk]] = {}
    for chunk in tensor.chunks:
        found.setdefault(chunk.start[:leading], []).append(chunk)
    return found


def _overlap(chunk: StoredChunk, start: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """Where a chunk and a rectangle meet, along each axis of the tensor; None if they do not."""
    spans = [(max(a, b), min(a + m, b + n)) for a, m, b, n in zip(chunk.start, chunk.shape, start, shape, strict=True)]
    return spans if all(a < b for a, b in spans) else None


def _within(start: tuple[int, ...], spans: list[tuple[int, int]]) -> tuple[slice, ...]:
    """Spans of a tensor as slices of the part of it that begins at `start`."""
    return tuple(slice(a - origin, b - origin) for origin, (a, b) in zip(start, spans, strict=True))


def _version(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns


def is_torch_dist(path: Path) -> bool:
    """Whether a folder is that of a distributed checkpoint: an iteration's, or one that names its iterations."""
    return (path / ".metadata").is_file() or (path / TRACKER).is_file()


def iteration_folder(path: Path) -> Path:
    """The folder with `.metadata`: `path` itself, or the iteration that its tracker file names.

    Raises:
        ValueError: neither; says what is there.
    """
    if os.path.lexists(path / METADATA_NAME):
        return path
    tracker = path / TRACKER
    if not os.path.lexists(tracker):
        check_folder(path, A_HUGGING_FACE_FOLDER)
        raise ValueError(
            f"{path}: neither .metadata nor {TRACKER} is there; give the folder of a torch_dist checkpoint"
        )
    regular_file(tracker)
    text = tracker.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,12}|release", text):
        raise ValueError(f"{tracker}: found {text[:40]!r}, expected an iteration or 'release'")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not os.path.lexists(folder / METADATA_NAME):
        check_folder(folder, A_HUGGING_FACE_FOLDER)
        raise ValueError(f"{folder}: {TRACKER} names this iteration and it has no .metadata; the save was not finished")
    return folder
