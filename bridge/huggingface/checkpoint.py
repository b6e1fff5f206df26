"""A Hugging Face checkpoint that has been checked: its files hold exactly the weights that config.json describes."""

from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from bridge.huggingface.safetensors_folder import SafetensorsFolder
from compiled.fp8 import dequantize_blockwise
from reference.checkpoint import SCALE_SUFFIX, check_tensors
from reference.config import ModelConfig
from reference.fp8 import FP8, are_powers_of_two, float32_scales
from reference.sharding import Piece


class HuggingFaceCheckpoint:
    """MiniMax-M2 as Hugging Face keeps it: `files` is the folder, `config` the model that it describes.

    `quantized` are the names of the weights that are float8 in the files; `mtp_tensors` are those of
    multi-token-prediction layers, `unneeded_tensors` those that no computation needs (`reference.extras`).

    Raises:
        ValueError: it is not a whole MiniMax-M2; names the file, tensor or key.
    """

    def __init__(self, files: SafetensorsFolder | Path | str):
        self.files = files if isinstance(files, SafetensorsFolder) else SafetensorsFolder(files)
        self.config = ModelConfig.from_hf(self.files.config_json)
        held = check_tensors(self.files.header, self.config)
        self.files.add_views(held.views)
        self.quantized, self.mtp_tensors, self.unneeded_tensors = held.quantized, held.mtp, held.unneeded

    @property
    def carried_tensors(self) -> list[str]:
        """Tensors that no megatron-core model holds, which go into the next checkpoint as they are."""
        return [*self.mtp_tensors, *self.unneeded_tensors]

    @property
    def notes(self) -> list[str]:
        """What lies in the folder and is not read."""
        return self.files.notes

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self.files.tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight, not of its scales."""
        return self.files.tensors[name].shape

    def stored(self, name: str) -> list[Tensor]:
        """As it is on disk: the weight, and its scales if it has them."""
        names = [name, name + SCALE_SUFFIX] if self.dtype(name) == FP8 else [name]
        return [self.files.read(stored) for stored in names]

    def read_scales(self, name: str, rows: slice | None = None) -> Tensor:
        """The block scales of a float8 weight, or those rows of them, as float32 whatever the file has."""
        return float32_scales(self.files.read(name + SCALE_SUFFIX, rows), name=name)

    def false_scale(self, scales: Literal["source", "fresh"]) -> str | None:
        """The first scale that is no power of two though config.json's `scale_fmt` says that all are; None if they are.

        Looked at are those that go into another checkpoint as they are: all where `scales` are the "source"'s, and
        always those of multi-token-prediction layers.
        """
        if self.config.quantization is None or self.config.quantization.scale_fmt != "ue8m0":
            return None
        names = self.files.tensors if scales == "source" else self.mtp_tensors
        weights = (name.removesuffix(SCALE_SUFFIX) for name in names if name.endswith(SCALE_SUFFIX))
        found = (weight for weight in weights if not are_powers_of_two(self.read_scales(weight)))
        return next((weight + SCALE_SUFFIX for weight in found), None)

    def read_weight(self, name: str, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Dequantised to `dtype` if it is float8, else as it is stored."""
        weight = self.files.read(name)
        if weight.dtype != FP8:
            return weight
        scale_inv = self.read_scales(name)
        return dequantize_blockwise(weight, scale_inv, block_size=self.config.block_size, dtype=dtype, name=name)

    def read_pieces(self, pieces: tuple[Piece, ...], out: Tensor) -> None:
        """Fill `out` with slices of weights, one below the other, each rounded once; padding is zero.

        Raises:
            ValueError: a weight or its scales are damaged, or a file changed; names the tensor.
        """
        start = 0
        for piece in pieces:
            stop = start + piece.rows[1] - piece.rows[0]
            self._read_piece(piece, out[start:stop])
            start = stop

    def _read_piece(self, piece: Piece, out: Tensor) -> None:
        if piece.source is None:
            out.zero_()
            return
        value = self.files.read(piece.source, slice(*piece.rows))
        if piece.cols is not None:
            value = value[:, slice(*piece.cols)]
        if value.dtype != FP8:
            out.copy_(value)
            return
        assert piece.cols is not None, "only matrices are float8"
        size = self.config.block_size
        row_blocks, col_blocks = (slice(start // size, -(-stop // size)) for start, stop in (piece.rows, piece.cols))
        try:
            dequantize_blockwise(
                value,
                self.read_scales(piece.source, row_blocks)[:, col_blocks],
                block_size=size,
                dtype=out.dtype,
                out=out,
                row_offset=piece.rows[0] % size,
                col_offset=piece.cols[0] % size,
                name=piece.source,
            )
        except ValueError:
            self.read_weight(piece.source)  # raises the same error, and says where in the whole weight
            raise

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit; compared eight bytes at a time, which is six times as fast as bfloat16."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    flat = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(*(x.view(torch.int64) if x.numel() % 8 == 0 else x for x in flat))
