"""What a proof asks of a checkpoint, whichever format it has."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.safetensors_folder import CONFIG_NAME, SafetensorsFolder
from bridge.torch_dist.checkpoint import MegatronCheckpoint
from bridge.torch_dist.reader import TorchDistFolder
from reference.config import ModelConfig
from reference.sharding import Piece


class Checkpoint(Protocol):
    """A checked checkpoint: its model, and its weights one at a time under their on-disk names."""

    config: ModelConfig

    @property
    def files(self) -> SafetensorsFolder | TorchDistFolder:
        """The folder."""
        ...

    @property
    def carried_tensors(self) -> list[str]:
        """Tensors that are not the model's: of multi-token-prediction layers, and those that nothing needs."""
        ...

    @property
    def notes(self) -> list[str]:
        """What lies in the folder and is not read."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight."""
        ...

    def stored(self, name: str) -> list[Tensor]:
        """As it is stored: the weight, and its scales if it has them."""
        ...

    def read_pieces(self, pieces: tuple[Piece, ...], out: Tensor) -> None:
        """Fill `out` with slices of weights, one below the other, each rounded once."""
        ...

    def read_weight(self, name: str, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight, dequantised to `dtype` if it is float8, else as it is stored."""
        ...


def open_checkpoint(path: Path | str, config: ModelConfig | None = None) -> Checkpoint:
    """A Hugging Face checkpoint if a config.json is there, else a distributed one; `config` is for the latter.

    Raises:
        ValueError: neither, or it is not whole.
    """
    if (Path(path) / CONFIG_NAME).is_file():
        return HuggingFaceCheckpoint(path)
    return MegatronCheckpoint(path, config)
