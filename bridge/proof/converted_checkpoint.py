"""A checkpoint that a converter made and that may be wrong, read as far as it goes.

`HuggingFaceCheckpoint` and `MegatronCheckpoint` refuse what is not whole. Here the model is that of the original, and
what does not fit is told by the names of `reference.conversion_mistakes`: what names, dtypes and shapes show at once
(`header_findings`), the rest with each tensor that is read (`Found.mistakes`).
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bridge.huggingface.safetensors_folder import CONFIG_NAME, SafetensorsFolder
from bridge.torch_dist.checkpoint import OF_THE_MODEL, open_folder
from bridge.torch_dist.reader import TorchDistFolder
from reference.checkpoint import PLAIN_DTYPES, SCALE_SUFFIX, contents
from reference.config import ModelConfig
from reference.dist_checkpoint import Entry, dialect_of, entries
from reference.fp8 import FP8, SCALE_DTYPES, scale_grid
from reference.mistaken_sources import Place, Stored
from reference.sharding import placements, unshard
from reference.weights import Layout, instances

Shape = tuple[int, ...]


class Found(NamedTuple):
    """A tensor, turned so that it has the original's shape where it can be; `mistakes` were undone for that."""

    stored: Stored
    mistakes: tuple[str, ...] = ()


class ConvertedCheckpoint(Protocol):
    """A checkpoint to judge."""

    def header_findings(self) -> Mapping[str, list[str]]:
        """Names of tensors by the mistake that headers show."""
        ...

    def read(self, place: Place) -> list[Found | None]:
        """What is found of a place's tensors; None where `header_findings` tells that there is no such tensor."""
        ...


def open_converted(path: Path | str, config: ModelConfig, carried: list[str]) -> ConvertedCheckpoint:
    """Open a checkpoint of either format that should hold the weights of `config`.

    `carried` are the original's tensors that are not the model's.

    Raises:
        ValueError: neither format is there, or its files are damaged.
    """
    if (Path(path) / CONFIG_NAME).is_file():
        return ConvertedHuggingFace(SafetensorsFolder(path), config, carried)
    return ConvertedMegatron(open_folder(path), config)


def _places(config: ModelConfig) -> dict[str, tuple[Layout, Shape]]:
    """The layout and the shape of every weight on disk."""
    found = {}
    for row, layer, expert in instances(config):
        for name, shape in zip(Place(row, layer, expert).names, row.shapes(config), strict=True):
            found[name] = (row.layout, shape)
    return found


def _fits(found: Shape, layout: Layout, shape: Shape) -> bool:
    """Whether a tensor can be read as one of `shape`: vectors of any length, which may be cut short."""
    if len(shape) == 1:
        return len(found) == 1 and found[0] > 0
    return found in (shape, shape[::-1]) or _is_padded(found, layout, shape)


def _is_padded(found: Shape, layout: Layout, shape: Shape) -> bool:
    return layout is Layout.VOCABULARY and found[0] > shape[0] and found[1:] == shape[1:]


class ConvertedHuggingFace:
    """Of safetensors files."""

    def __init__(self, files: SafetensorsFolder, config: ModelConfig, carried: list[str]):
        self.files, self._config, self._carried = files, config, carried
        held = contents(files.header, config)
        files.add_views(held.views)
        self._accepted = {*carried, *held.mtp, *held.unneeded}
        self._weights = _places(config)
        self._read_whole = lru_cache(maxsize=1)(files.read)  # a transposed vocabulary is asked for in many pieces

    def header_findings(self) -> Mapping[str, list[str]]:
        """See `ConvertedCheckpoint`."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self._weights:
            for mistake in self._seen(name):
                found[mistake].append(name)
        found["carried_lost"] = [name for name in self._carried if name not in self.files.tensors]
        for name in self.files.tensors:
            if name not in self._accepted and name.removesuffix(SCALE_SUFFIX) not in self._weights:
                found["extra"].append(name)
        return {mistake: names for mistake, names in found.items() if names}

    def _seen(self, name: str) -> list[str]:
        """What headers tell of one weight."""
        layout, shape = self._weights[name]
        info, scales = self.files.tensors.get(name), self.files.tensors.get(name + SCALE_SUFFIX)
        if info is None:
            return ["missing"]
        if info.dtype not in (*PLAIN_DTYPES, *([FP8] if len(shape) == 2 else [])):
            return ["wrong_dtype"]
        if not _fits(info.shape, layout, shape):
            return ["wrong_shape"]
        if scales is None:
            return []
        if info.dtype != FP8:
            return ["scales_left_over"]
        grids = (scale_grid(info.shape, self._config.block_size), scale_grid(shape, self._config.block_size))
        known = scales.shape in (*grids, *(grid[::-1] for grid in grids)) or math.prod(scales.shape) == 1
        return [] if known and scales.dtype in SCALE_DTYPES else ["wrong_grid"]

    def read(self, place: Place) -> list[Found | None]:
        """See `ConvertedCheckpoint`."""
        return [self._read(name, place.rows) for name in place.names]

    def _read(self, name: str, rows: tuple[int, int] | None) -> Found | None:
        if not {"missing", "wrong_dtype", "wrong_shape", "wrong_grid"}.isdisjoint(self._seen(name)):
            return None
        (layout, shape), info = self._weights[name], self.files.tensors[name]
        mistakes = ["padding_left_in"] if _is_padded(info.shape, layout, shape) else []
        turned = len(shape) == 2 and info.shape == shape[::-1] != shape
        if turned:
            mistakes.append("transposed")
            values = self._read_whole(name).T[slice(*rows) if rows else slice(None)].contiguous()
        else:
            values = self.files.read(name, slice(*rows) if rows else None)  # a vocabulary always in rows of the model's
        scales = None
        if info.dtype == FP8 and name + SCALE_SUFFIX in self.files.tensors:
            scales, is_transposed = self._scales(name, shape, turned=turned)
            mistakes += ["scales_transposed"] if is_transposed else []
            size = self._config.block_size
            scales = scales[rows[0] // size : -(-rows[1] // size)] if rows else scales
        return Found(Stored(values, scales), tuple(mistakes))

    def _scales(self, name: str, shape: Shape, *, turned: bool) -> tuple[Tensor, bool]:
        """On the grid of the original's shape; and whether they were transposed while the weight is not."""
        scales = self.files.read(name + SCALE_SUFFIX).to(torch.float32)
        grid = scale_grid(shape, self._config.block_size)
        if scales.numel() == 1:
            return scales.reshape(1, 1).expand(grid), False
        if tuple(scales.shape) == grid and not (turned and grid == grid[::-1]):
            return scales, False
        if tuple(scales.shape) == grid[::-1]:
            return scales.T, not turned
        return scales[: grid[0], : grid[1]], False  # of a padded vocabulary


class ConvertedMegatron:
    """Of megatron-core's torch_dist files."""

    def __init__(self, files: TorchDistFolder, config: ModelConfig):
        self.files = files
        places = (Place(row, layer, expert) for row, layer, expert in instances(config))
        found = entries(config, dialect=dialect_of(files.shapes))
        self._entries: dict[Place, Entry] = dict(zip(places, found, strict=True))

    def header_findings(self) -> Mapping[str, list[str]]:
        """See `ConvertedCheckpoint`."""
        found: dict[str, list[str]] = defaultdict(list)
        for place, entry in self._entries.items():
            for mistake in self._seen(entry):
                found[mistake] += place.names
        known = {entry.key for entry in self._entries.values()}
        others = [key for key in self.files.shapes if key.startswith(OF_THE_MODEL) and key not in known]
        others += {key for entry in self._entries.values() for key in self._beyond(entry)}
        return dict(found) | ({"extra": sorted(others)} if others else {})

    def _beyond(self, entry: Entry) -> Iterator[str]:
        """Layers or experts of its tensor that the model does not have."""
        shape = self.files.shapes.get(entry.key, ())
        if len(shape) == len(entry.shape):
            for axis, (found, size) in enumerate(zip(shape, entry.leading, strict=False)):
                if found > size:
                    yield f"{entry.key}[{':, ' * axis}{size}:{found}]"

    def _seen(self, entry: Entry) -> list[str]:
        shape = self.files.shapes.get(entry.key)
        if shape is None:
            return ["missing"]
        leading, tail = shape[: len(entry.leading)], shape[len(entry.leading) :]
        if self.files.dtype(entry.key) not in PLAIN_DTYPES:
            return ["wrong_dtype"]
        if len(shape) != len(entry.shape) or not _fits(tail, entry.row.layout, entry.parameter.shape):
            return ["wrong_shape"]
        return [] if all(index < size for index, size in zip(entry.index, leading, strict=True)) else ["missing"]

    def read(self, place: Place) -> list[Found | None]:
        """See `ConvertedCheckpoint`."""
        entry = self._entries[place._replace(rows=None)]
        if self._seen(entry):
            return [None for _ in place.names]
        parameter = entry.parameter
        tail = self.files.shapes[entry.key][len(entry.leading) :]
        turned = len(tail) == 2 and tail == parameter.shape[::-1] != parameter.shape
        if turned:
            values = self._rectangle(entry, (0, 0), tail).T[slice(*place.rows) if place.rows else slice(None)]
        elif place.rows:
            values = self._rectangle(entry, (place.rows[0], 0), (place.rows[1] - place.rows[0], tail[1]))
        else:
            values = self._rectangle(entry, tuple(0 for _ in tail), tail)
        if place.rows or len(parameter.sources) == 1:
            parts = [values]
        else:
            held = {(0, parameter.chunk, parameter.name): values}
            placed = placements({0: [parameter]})
            parts = [unshard(placed[name], held) for name in place.names]
        return [Found(Stored(part.contiguous(), None), ("transposed",) if turned else ()) for part in parts]

    def _rectangle(self, entry: Entry, start: Shape, shape: Shape) -> Tensor:
        return self.files.read(entry.key, (*entry.index, *start), (*(1 for _ in entry.index), *shape)).view(shape)
