"""Which known mistakes explain what a converter made of a weight.

The original's tensors go through every chain of `reference.mistake_chains` that concerns them, until each tensor
that differs is explained: first through the chains that have explained others of the same row, then through each
mistake alone, then through two. Most are refused by a few rows or columns.

A search that finds nothing is long. After `MOST_FAILURES` tensors of a row without an explanation only the chains that
have explained others of that row are tried, so that a checkpoint of another model does not take hours.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.proof.checkpoint import Checkpoint
from reference.config import ModelConfig
from reference.conversion_mistakes import BY_COLUMNS, Elsewhere, Reach
from reference.fp8 import FP8
from reference.mistake_chains import Chain, chains, elsewhere, reach, results
from reference.mistaken_sources import WHOLE, Group, Place, Stored, Window, decode
from reference.mistaken_values import Parts
from reference.sharding import Piece
from reference.weights import Row, Storage

MOST_FAILURES = 4
FEW_LINES = 16  # of a matrix, on which most chains are refused
FEW_VALUES = 64  # by which tensors are looked for among many
UNITS_IN_THE_LAST_PLACE = 2


class Original:
    """The checkpoint that was converted, read by `Place`; what was read last is kept."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.stored = lru_cache(maxsize=8)(self._stored)
        self.first_values = lru_cache(maxsize=100_000)(self._first_values)

    def _stored(self, place: Place) -> Group:
        return tuple(self._one(name, place.rows) for name in place.names)

    def _one(self, name: str, rows: tuple[int, int] | None) -> Stored:
        source = self.checkpoint
        if not isinstance(source, HuggingFaceCheckpoint):
            return Stored(self.read(name, rows, source.dtype(name)), None)
        values = source.files.read(name, slice(*rows) if rows else None)
        if values.dtype != FP8:
            return Stored(values, None)
        size = self.config.block_size
        return Stored(values, source.read_scales(name, slice(rows[0] // size, -(-rows[1] // size)) if rows else None))

    def read(self, name: str, rows: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
        """Rows of a weight (None: all), dequantised, rounded once to `dtype`."""
        shape = self.checkpoint.shape(name)
        start, stop = rows or (0, shape[0])
        out = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        cols = (0, shape[1]) if len(shape) == 2 else None
        self.checkpoint.read_pieces((Piece(name, (start, stop), cols),), out)
        return out

    def _first_values(self, place: Place, part: int) -> tuple[float, ...]:
        return first_values(self.read(place.names[part], (0, 1), torch.bfloat16))


def first_values(value: Tensor) -> tuple[float, ...]:
    """The beginning of a weight, by which it is looked for; a vector has one value for each row."""
    return tuple(value[:1].reshape(-1)[:FEW_VALUES].to(torch.bfloat16).tolist())


class Judged(NamedTuple):
    """A tensor that was found, in float32.

    `dtype` is that of the file. The right value is one of its `roundings`.
    """

    part: int
    value: Tensor
    dtype: torch.dtype
    roundings: tuple[torch.dtype, ...]

    def is_made_by(self, value: Tensor, right: Tensor | None) -> bool:
        """Whether a value in float32 becomes this one when it is rounded.

        With `right`, to within some units in the last place, if the right value is further away than those.
        """
        if value.shape != self.value.shape:
            return False
        if right is None:
            return any(torch.equal(value.to(dtype).to(torch.float32), self.value) for dtype in self.roundings)
        dtypes = self.roundings if self.dtype == FP8 else (*self.roundings, self.dtype)
        near = UNITS_IN_THE_LAST_PLACE * max(torch.finfo(dtype).eps for dtype in dtypes)
        slack = near * value.abs().clamp(min=value.abs().mean())
        if not ((value - self.value).abs() <= slack).all():
            return False
        return right.shape != value.shape or bool(((right - self.value).abs() > 4 * slack).any())


def judged(part: int, found: Stored, original: Stored, row: Row, config: ModelConfig) -> Judged:
    """What was found at a place, and how the right value may be rounded there."""
    dtype, stored = found.values.dtype, original.values.dtype
    value = decode(found, config)
    if dtype == FP8 and stored != FP8:  # it encodes the original's values, in their dtype
        return Judged(part, value.to(stored).to(torch.float32), dtype, (stored,))
    return Judged(part, value, dtype, right_dtypes(dtype, stored, row))


def right_dtypes(found: torch.dtype, stored: torch.dtype, row: Row) -> tuple[torch.dtype, ...]:
    """To which dtypes the right value may have been rounded, where it is `found` now and `stored` in the original.

    To bfloat16 unless it stays float32 or as it is: a float32 file may hold bfloat16 values.
    """
    if row.storage is Storage.FLOAT32 or (found == torch.float16 and stored != torch.float16):
        return (torch.float32,)
    if found == torch.float32 and stored == FP8:
        return torch.float32, torch.bfloat16
    return (torch.float32 if found == FP8 else found,)


def _makes(chain: Chain, made: Parts, found: Judged, right: Parts) -> bool:
    return found.is_made_by(made[found.part], None if all(one.exact for one in chain) else right[found.part])


class Explainer:
    """Looks for explanations, and remembers what explained others."""

    def __init__(self, original: Original):
        self.original, self.config = original, original.config
        self._known: dict[Row, list[Chain]] = {}
        self._failures: Counter[Row] = Counter()

    def explain(self, place: Place, differing: Sequence[Judged], right: Parts) -> dict[int, Chain]:
        """The mistakes by the part of the row that they explain; those that nothing explains are left out."""
        left = {one.part: one for one in differing}
        explained: dict[int, Chain] = {}
        for chain in self._candidates(place.row):
            for part in self._explained_by(chain, place, list(left.values()), right):
                explained[part] = chain
                del left[part]
                known = self._known.setdefault(place.row, [])
                if chain not in known:
                    known.append(chain)
            if not left:
                break
        self._failures[place.row] += bool(left)
        return explained

    def _candidates(self, row: Row) -> Iterator[Chain]:
        known = list(self._known.get(row, []))
        yield from known
        if self._failures[row] < MOST_FAILURES:
            yield from (chain for chain in chains(row) if chain not in known)

    def _explained_by(self, chain: Chain, place: Place, left: list[Judged], right: Parts) -> Iterator[int]:
        """The parts that one way of making a chain of mistakes gives exactly, each once."""
        window = self._window(chain, place, left, right)
        seen = [one._replace(value=window.of(one.value)) for one in left]
        beside = tuple(map(window.of, right))
        remaining = {one.part for one in left}
        for other in self._places(chain, place, left):
            stored = self.original.stored(other)
            for way, made in enumerate(self._results(chain, stored, seen, window)):
                if not any(_makes(chain, made, one, beside) for one in seen if one.part in remaining):
                    continue
                whole = made if window == WHOLE else next(islice(self._results(chain, stored, left, WHOLE), way, None))
                for one in left:
                    if one.part in remaining and _makes(chain, whole, one, right):
                        remaining.remove(one.part)
                        yield one.part

    def _results(self, chain: Chain, stored: Group, found: list[Judged], window: Window) -> Iterator[Parts]:
        return results(chain, stored, tuple(one.value for one in found), self.config, window)

    def _window(self, chain: Chain, place: Place, left: list[Judged], right: Parts) -> Window:
        """How much of the tensors is enough to refuse a chain; all where their shapes are not the original's."""
        lines = {Reach.LINE: FEW_LINES, Reach.BLOCK: self.config.block_size, Reach.WHOLE: None}[reach(chain)]
        if any(one.value.shape != right[one.part].shape for one in left):
            return WHOLE
        return Window(lines, None) if place.row.layout in BY_COLUMNS else Window(None, lines)

    def _places(self, chain: Chain, place: Place, left: list[Judged]) -> list[Place]:
        """From where a chain takes the tensors; of many places those that begin like what was found."""
        places = elsewhere(chain, place, self.config)
        if not any(isinstance(one.change, Elsewhere) and one.change.many for one in chain):
            return places
        return [
            other
            for other in places
            if any(first_values(one.value) == self.original.first_values(other, one.part) for one in left)
        ]
