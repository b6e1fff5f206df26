"""A megatron-core distributed checkpoint that has been checked: it holds exactly the weights of a MiniMax-M2."""

import math
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from bridge.formats import check_distributed, check_model
from bridge.huggingface.read_json import read_object
from bridge.huggingface.regular_files import file_inside
from bridge.huggingface.safetensors_folder import CONFIG_NAME
from bridge.torch_dist.reader import TorchDistFolder, iteration_folder
from reference.checkpoint import parameter_count
from reference.config import ModelConfig
from reference.dist_checkpoint import Entry, dialect_of, entries
from reference.sharding import Piece, placements, unshard
from reference.weights import Layout

HF_FOLDER = "hugging_face"  # beside a torch_dist checkpoint: what megatron-core has no place for


class MegatronCheckpoint:
    """MiniMax-M2 as megatron-core keeps it: `files` is the folder, the weights have Hugging Face's on-disk names.

    `config` is the model; None reads the config.json that `minimax-m2 import` lays beside the checkpoint.

    Raises:
        ValueError: the folder does not hold the weights of this config, with their shapes; or there is no config.
    """

    def __init__(self, files: TorchDistFolder | Path | str, config: ModelConfig | None = None):
        self.files = files if isinstance(files, TorchDistFolder) else open_folder(files)
        self.config = config = config or read_config(beside(self.files) / CONFIG_NAME)
        self.entries = _entries(self.files, config)
        self._homes = {name: entry for entry in self.entries for name in entry.parameter.sources}
        self._parameter = lru_cache(maxsize=1)(self._read_parameter)  # q, k, v and w1, w3 come one after the other

    @property
    def carried_tensors(self) -> list[str]:
        """Tensors that are not the model's: none here."""
        return []

    @property
    def notes(self) -> list[str]:
        """What lies in the folder and is not read: nothing that this says."""
        return []

    @property
    def trained_mtp(self) -> list[str]:
        """Keys of multi-token-prediction layers that were trained: megatron-core's own, with no on-disk names here."""
        return sorted(key for key in self.files.shapes if key.startswith(_OF_MTP))

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self.files.dtype(self._homes[name].key)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight under its on-disk name."""
        pieces = [place.piece for place in placements({0: [self._homes[name].parameter]})[name]]
        rows = sum(stop - start for start, stop in (piece.rows for piece in pieces))
        return (rows,) if pieces[0].cols is None else (rows, pieces[0].cols[1])

    def stored(self, name: str) -> list[Tensor]:
        """The weight alone: nothing has scales here."""
        return [self.read_weight(name)]

    def read_weight(self, name: str, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """As it is stored; there is no float8 weight to dequantise to `dtype`."""
        return self._parameter(self._homes[name].parameter.sources)[name]

    def read_rows(self, entry: Entry, start: int, stop: int) -> Tensor:
        """Rows of one weight, without reading all of it."""
        _, *cols = entry.parameter.shape
        at, shape = (*entry.index, start, *(0 for _ in cols)), (stop - start, *cols)
        return self.files.read(entry.key, at, (*(1 for _ in entry.index), *shape)).view(shape)

    def read_pieces(self, pieces: tuple[Piece, ...], out: Tensor) -> None:
        """Fill `out` with slices of weights, one below the other, each rounded once.

        Raises:
            ValueError: a file is damaged or changed.
        """
        start = 0
        for source, rows, _ in pieces:
            assert source is not None, "whole weights have no padding"
            entry, stop = self._homes[source], start + rows[1] - rows[0]
            alone = len(entry.parameter.sources) == 1
            out[start:stop] = self.read_rows(entry, *rows) if alone else self.read_weight(source)[slice(*rows)]
            start = stop

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(self.files.nbytes(key) for key in {entry.key for entry in self.entries})

    @property
    def other_tensors(self) -> int:
        """How many tensors are in the folder that are not the model's, MTP layers included: the optimizer's."""
        return len(self.files.shapes) - len({entry.key for entry in self.entries}) - len(self.trained_mtp)

    def _read_parameter(self, sources: tuple[str, ...]) -> dict[str, Tensor]:
        entry = self._homes[sources[0]]
        parameter = entry.parameter
        held = {(0, parameter.chunk, parameter.name): self.read_rows(entry, 0, parameter.shape[0])}
        return {name: unshard(places, held) for name, places in placements({0: [parameter]}).items()}


def open_folder(path: Path | str) -> TorchDistFolder:
    """The folder of a distributed checkpoint, whatever weights it holds.

    Raises:
        ValueError: there is none, it is damaged, or it is of another format than `torch_dist`.
    """
    try:
        files = TorchDistFolder(path)
    except ValueError:
        check_distributed(iteration_folder(Path(path)), ())  # another format's metadata may hold what this may not
        raise
    check_distributed(files.folder, files.shapes)
    return files


def read_config(path: Path) -> ModelConfig:
    """The model of a config.json.

    Raises:
        ValueError: it is not a MiniMax-M2's.
    """
    found = read_object(path)
    check_model(found, path)
    return ModelConfig.from_hf(found)


# megatron-core 0.19: GPTModel (mtp.layers.0.transformer_layer...) and HybridModel (...mtp_model_layer...).
_OF_MTP = "mtp."
OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")  # the rest is the optimizer's


def beside(files: TorchDistFolder) -> Path:
    """The folder with the Hugging Face files that belong to a distributed checkpoint.

    Raises:
        ValueError: there is none, or config.json is not a file of the checkpoint.
    """
    for folder in (files.folder, files.folder.parent):
        if os.path.lexists(folder / HF_FOLDER / CONFIG_NAME):
            file_inside(folder, f"{HF_FOLDER}/{CONFIG_NAME}")
            return folder / HF_FOLDER
    raise ValueError(
        f"{files.folder}: no {HF_FOLDER}/{CONFIG_NAME} is there, which `minimax-m2 import` writes, so the model's "
        "config is not known; give the Hugging Face checkpoint that training started from as source (import: as "
        "hugging_face)"
    )


def _entries(files: TorchDistFolder, config: ModelConfig) -> list[Entry]:
    asked, stored = parameter_count(config), sum(math.prod(shape) for shape in files.shapes.values())
    if asked > 2 * stored:  # a wrong config.json may ask for more layers than can be listed
        raise ValueError(
            f"{files.folder}: holds {stored} weights and config.json describes {asked}; checkpoint and config do "
            "not belong together"
        )
    found = list(entries(config, dialect=dialect_of(files.shapes)))
    for entry in found:
        if entry.key not in files.shapes:
            raise ValueError(f"{entry.key}: missing from {files.folder}; is it a MiniMax-M2 of these sizes?")
        shape = files.shapes[entry.key]
        padded = entry.row.layout is Layout.VOCABULARY and shape[0] >= entry.shape[0] and shape[1:] == entry.shape[1:]
        if shape != entry.shape and not padded:
            raise ValueError(
                f"{entry.key}: found shape {list(shape)} in {files.folder}, expected {list(entry.shape)} from "
                "config.json's sizes; checkpoint and config do not belong together"
            )
    others = {key for key in files.shapes if key.startswith(OF_THE_MODEL)} - {entry.key for entry in found}
    if others:
        raise ValueError(
            f"{min(others)}: in {files.folder}, and config.json describes no such weight; checkpoint and config "
            "do not belong together"
        )
    return found
