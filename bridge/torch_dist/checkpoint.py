"""A checkpoint as a set of weights under their on-disk names, whichever format it has.

`HFWeights` and `TorchDistWeights` answer the same questions: the model's config, which weights there are, and the value
of one. `open_weights` tells which format a folder has.
"""

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from bridge.huggingface.safetensors_folder import CONFIG_NAME, read_object
from bridge.torch_dist.reader import TorchDistCheckpoint
from reference.checkpoint import parameter_count
from reference.config import ModelConfig
from reference.dist_checkpoint import Entry, entries
from reference.names import Layout
from reference.sharding import placements, unshard

HF_FOLDER = "hugging_face"  # beside a torch_dist checkpoint: what megatron-core has no place for


class TorchDistWeights:
    """The weights of a megatron-core distributed checkpoint; `config` is Hugging Face's, without quantisation.

    Raises:
        ValueError: it does not hold the weights of this config, with their shapes.
    """

    def __init__(self, path: Path | str, config: ModelConfig | None = None):
        self.checkpoint = TorchDistCheckpoint(path)
        if config is None:
            config = ModelConfig.from_hf(read_object(beside(self.checkpoint) / CONFIG_NAME))
        self.config = config
        self.entries = _entries(self.checkpoint, config)
        self._homes = {name: entry for entry in self.entries for name in entry.parameter.sources}
        self._parameter = lru_cache(maxsize=1)(self._read_parameter)  # q, k, v and w1, w3 come one after the other

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self.checkpoint.dtype(self._homes[name].key)

    def shape(self, name: str) -> tuple[int, ...]:
        pieces = [place.piece for place in placements({0: [self._homes[name].parameter]})[name]]
        rows = sum(stop - start for start, stop in (piece.rows for piece in pieces))
        return (rows,) if pieces[0].cols is None else (rows, pieces[0].cols[1])

    def read_weight(self, name: str, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """As it is stored; megatron-core has no float8 weights to decode."""
        return self._parameter(self._homes[name].parameter.sources)[name]

    def read_rows(self, entry: Entry, start: int, stop: int) -> Tensor:
        """Rows of one weight, without reading all of it."""
        _, *cols = entry.parameter.shape
        at, shape = (*entry.index, start, *(0 for _ in cols)), (stop - start, *cols)
        return self.checkpoint.read(entry.key, at, (*(1 for _ in entry.index), *shape)).view(shape)

    def _read_parameter(self, sources: tuple[str, ...]) -> dict[str, Tensor]:
        entry = self._homes[sources[0]]
        parameter = entry.parameter
        held = {(0, parameter.chunk, parameter.name): self.read_rows(entry, 0, parameter.shape[0])}
        return {name: unshard(places, held) for name, places in placements({0: [parameter]}).items()}


_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")  # the rest is the optimizer's


def beside(checkpoint: TorchDistCheckpoint) -> Path:
    """The folder with the Hugging Face files that belong to a distributed checkpoint.

    Raises:
        ValueError: there is none.
    """
    for folder in (checkpoint.folder, checkpoint.folder.parent):
        if (folder / HF_FOLDER / CONFIG_NAME).is_file():
            return folder / HF_FOLDER
    raise ValueError(
        f"{checkpoint.folder}: no {HF_FOLDER}/{CONFIG_NAME} is there, which `minimax-m2 import` writes, so the model's "
        "config is not known; give the Hugging Face checkpoint that training started from as source"
    )


def _entries(checkpoint: TorchDistCheckpoint, config: ModelConfig) -> list[Entry]:
    asked, stored = parameter_count(config), sum(math.prod(shape) for shape in checkpoint.shapes.values())
    if asked > 2 * stored:  # a wrong config.json may ask for more layers than can be listed
        raise ValueError(
            f"{checkpoint.folder}: holds {stored} weights and config.json describes {asked}; checkpoint and config do "
            "not belong together"
        )
    stacked, per_layer = (list(entries(config, layer_keys=layer_keys)) for layer_keys in (False, True))
    found = stacked if any(entry.key in checkpoint.shapes for entry in stacked if entry.index) else per_layer
    for entry in found:
        if entry.key not in checkpoint.shapes:
            raise ValueError(f"{entry.key}: missing from {checkpoint.folder}; is it a MiniMax-M2 of these sizes?")
        shape = checkpoint.shapes[entry.key]
        padded = entry.row.layout is Layout.VOCABULARY and shape[0] >= entry.shape[0] and shape[1:] == entry.shape[1:]
        if shape != entry.shape and not padded:
            raise ValueError(
                f"{entry.key}: found shape {list(shape)} in {checkpoint.folder}, expected {list(entry.shape)} from "
                "config.json's sizes; checkpoint and config do not belong together"
            )
    others = {key for key in checkpoint.shapes if key.startswith(_OF_THE_MODEL)} - {entry.key for entry in found}
    if others:
        raise ValueError(
            f"{min(others)}: in {checkpoint.folder}, and config.json describes no such weight; checkpoint and config "
            "do not belong together"
        )
    return found
