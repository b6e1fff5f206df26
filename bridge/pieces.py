"""One piece of a parameter, from the bytes of a checkpoint into memory: dequantised, or rounded once."""

from torch import Tensor

from bridge.hf_files import HFCheckpoint
from compiled.fp8 import dequantize_blockwise
from reference.checkpoint import SCALE_SUFFIX
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
