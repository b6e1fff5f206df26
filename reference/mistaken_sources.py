"""From which of the original's weights, and by which scales, a converter's known mistakes take a value.

`Place` is where weights belong, `Stored` what the original keeps of one. The functions yield a place or a grid of
scales for each way of making a mistake.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from reference.config import ModelConfig
from reference.fp8 import FP8
from reference.weights import TABLE, Dialect, Row, Scope


class Place(NamedTuple):
    """The weights of one row of TABLE in one layer and expert; of a vocabulary, perhaps only rows (start, stop)."""

    row: Row
    layer: int
    expert: int
    rows: tuple[int, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """On disk."""
        return self.row.format(Dialect.HF_DISK, self.layer, self.expert)


class Stored(NamedTuple):
    """A tensor as it is stored: float8 codes and their float32 scales, or plain values and None."""

    values: Tensor
    scales: Tensor | None


Group = tuple[Stored, ...]
"""What is stored at a `Place`, a tensor for each of its names."""


class Window(NamedTuple):
    """The first rows and columns of a matrix, None for all of them; of a vector everything."""

    rows: int | None
    cols: int | None

    def of(self, value: Tensor) -> Tensor:
        """What is seen."""
        return value[: self.rows, : self.cols] if value.dim() == 2 else value


WHOLE = Window(None, None)


def decode(stored: Stored, config: ModelConfig, window: Window = WHOLE) -> Tensor:
    """The values in float32; whatever the scales are, and without scales the codes themselves.

    `reference.fp8.dequantize_blockwise` is the law; this has no checks, since what is judged may be wrong.
    """
    weight, size = window.of(stored.values), config.block_size
    value = weight.to(torch.float32)
    if stored.scales is None or weight.dtype != FP8:
        return value
    rows, cols = weight.shape
    scales = stored.scales[: -(-rows // size), : -(-cols // size)]
    return value * scales.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :cols]


# --- From which weight it is taken. ---


def next_layers(place: Place, config: ModelConfig) -> Iterator[Place]:
    """The layer after and the layer before, in a circle."""
    for step in (1, -1):
        yield place._replace(layer=(place.layer + step) % config.num_hidden_layers)


def all_layers(place: Place, config: ModelConfig) -> Iterator[Place]:
    """Every other layer."""
    yield from (place._replace(layer=layer) for layer in range(config.num_hidden_layers) if layer != place.layer)


def round_robin(place: Place, config: ModelConfig) -> Iterator[Place]:
    """Experts dealt to the ranks in turn, where each rank has a run of them; or the inverse."""
    experts = config.num_local_experts
    for ranks in range(2, experts):
        if experts % ranks == 0:
            rank, local = divmod(place.expert, experts // ranks)
            yield place._replace(expert=local * ranks + rank)


def all_experts(place: Place, config: ModelConfig) -> Iterator[Place]:
    """Every other expert of the layer."""
    yield from (place._replace(expert=expert) for expert in range(config.num_local_experts) if expert != place.expert)


def other_row(place: Place, _: ModelConfig) -> Iterator[Place]:
    """The other row of the same shape: of the two norms of a layer, of embedding and head."""
    for row in TABLE:
        alike = row.axes == place.row.axes and (row.scope is Scope.MODEL) == (place.row.scope is Scope.MODEL)
        if alike and row is not place.row:
            yield place._replace(row=row)


# --- By which scales it is decoded. ---


def no_scales(scales: Tensor) -> Iterator[Tensor]:
    """Of 1."""
    yield torch.ones_like(scales)


def squared(scales: Tensor) -> Iterator[Tensor]:
    """Applied twice."""
    yield scales * scales


def inverted(scales: Tensor) -> Iterator[Tensor]:
    """Divided by."""
    yield 1 / scales


def narrowed(scales: Tensor) -> Iterator[Tensor]:
    """Rounded to a narrower dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        yield scales.to(dtype).to(torch.float32)


def powers_of_two(scales: Tensor) -> Iterator[Tensor]:
    """Rounded to powers of two: up, to the nearest, down."""
    exponent = scales.log2()
    yield from (torch.exp2(rounded) for rounded in (exponent.ceil(), exponent.round(), exponent.floor()))


def transposed_grid(scales: Tensor) -> Iterator[Tensor]:
    """The grid read by columns, or written so."""
    rows, cols = scales.shape
    yield scales.T.reshape(rows, cols)
    yield scales.reshape(cols, rows).T


def one_scale(scales: Tensor) -> Iterator[Tensor]:
    """One for all blocks: the largest, the least, the mean, the first."""
    for one in (scales.max(), scales.min(), scales.mean(), scales[0, 0]):
        yield one.expand(scales.shape)
