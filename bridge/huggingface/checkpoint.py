"""One piece of a parameter, from the bytes of a checkpoint into memory: dequantised, or rounded once."""

from pathlib import Path

import torch
from torch import Tensor

from bridge.huggingface.safetensors_folder import HFCheckpoint
from compiled.fp8 import dequantize_blockwise
from reference.checkpoint import SCALE_SUFFIX, check_tensors
from reference.config import ModelConfig
from reference.fp8 import FP8
from reference.sharding import Piece


def read_pieces(checkpoint: HFCheckpoint, config: ModelConfig, pieces: tuple[Piece, ...], out: Tensor) -> None:
    """Fill `out` with the pieces, one below the other; padding is zero.

    Raises:
        ValueError: a weight or its scales are damaged, or a file changed; names the tensor.
    """
    start = 0
    for piece in pieces:
        stop = start + piece.rows[1] - piece.rows[0]
        _read_piece(checkpoint, config, piece, out[start:stop])
        start = stop


def _read_piece(checkpoint: HFCheckpoint, config: ModelConfig, piece: Piece, out: Tensor) -> None:
    if piece.source is None:
        out.zero_()
        return
    value = checkpoint.read_slice(piece.source, slice(*piece.rows), piece.cols and slice(*piece.cols))
    if value.dtype != FP8:
        out.copy_(value)
        return
    size = config.block_size
    blocks = [slice(span[0] // size, -(-span[1] // size)) for span in (piece.rows, piece.cols)]
    dequantize_blockwise(
        value,
        checkpoint.read_slice(piece.source + SCALE_SUFFIX, *blocks),
        block_size=size,
        dtype=out.dtype,
        out=out,
        row_offset=piece.rows[0] % size,
        col_offset=piece.cols[0] % size,
        name=piece.source,
    )


class HFWeights:
    """The weights of a Hugging Face checkpoint.

    Raises:
        ValueError: it is not a whole MiniMax-M2.
    """

    def __init__(self, source: HFCheckpoint | Path | str):
        self.checkpoint = source if isinstance(source, HFCheckpoint) else HFCheckpoint(source)
        self.config = ModelConfig.from_hf(self.checkpoint.config)
        check_tensors({name: (info.dtype, info.shape) for name, info in self.checkpoint.tensors.items()}, self.config)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self.checkpoint.tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[name].shape

    def stored(self, name: str) -> list[Tensor]:
        """As it is on disk: the weight, and its scales if it has them."""
        names = [name, name + SCALE_SUFFIX] if self.dtype(name) == FP8 else [name]
        return [self.checkpoint.read(stored) for stored in names]

    def read_weight(self, name: str, *, dtype: torch.dtype) -> Tensor:
        """Dequantised to `dtype` if it is float8, else as it is stored."""
        weight, *scales = self.stored(name)
        if not scales:
            return weight
        return dequantize_blockwise(weight, *scales, block_size=self.config.block_size, dtype=dtype, name=name)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit; compared eight bytes at a time, which is six times as fast as bfloat16."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    flat = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(*(x.view(torch.int64) if x.numel() % 8 == 0 else x for x in flat))
