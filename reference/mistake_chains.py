"""Mistakes of `reference.conversion_mistakes`, made one after the other: which can meet, and what comes of them."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations

from torch import Tensor

from reference.config import ModelConfig
from reference.conversion_mistakes import MISTAKES, STEPS, Changed, Elsewhere, Mistake, Reach, Rounded, Scales
from reference.mistaken_sources import WHOLE, Group, Place, Stored, Window, decode
from reference.mistaken_values import Parts
from reference.weights import Row, Storage

Chain = tuple[Mistake, ...]
"""Mistakes made one after the other."""


@cache
def chains(row: Row) -> tuple[Chain, ...]:
    """Every mistake that a row's weights may have, alone, and then with another one, in the order of the steps.

    Two of one step are tried where they change values: those in either order. One of `Reach.WHOLE`, and one that may
    come from many places, is tried alone.
    """
    known = [mistake for mistake in MISTAKES if mistake.change is not None and mistake.concerns(row)]
    first = [one for one in known if not (isinstance(one.change, Elsewhere) and one.change.many)]
    composable = [one for one in first if reach((one,)) < Reach.WHOLE or row.storage is Storage.FLOAT32]
    pairs = [pair for pair in permutations(composable, 2) if _may_follow(*pair)]
    return (*((one,) for one in known), *pairs)


def _may_follow(first: Mistake, second: Mistake) -> bool:
    steps = [STEPS.index(type(one.change)) for one in (first, second)]  # pyright: ignore[reportArgumentType]
    return steps[0] < steps[1] or steps == [STEPS.index(Changed)] * 2


def reach(chain: Chain) -> Reach:
    """On how much of the original a value of the result depends."""
    return max((one.change.reach for one in chain if isinstance(one.change, Changed)), default=Reach.LINE)


def elsewhere(chain: Chain, place: Place, config: ModelConfig) -> list[Place]:
    """The places from which a chain of mistakes may take what belongs to `place`."""
    places = [place]
    for mistake in chain:
        if isinstance(mistake.change, Elsewhere):
            places = [other for one in places for other in mistake.change.places(one, config)]
    return places


def results(chain: Chain, stored: Group, found: Parts, config: ModelConfig, window: Window = WHOLE) -> Iterator[Parts]:
    """What a chain of mistakes makes of the original's tensors, taken from a place of `elsewhere`, in float32.

    Only those in a window, which is at least as large as the chain's `reach`. `found` is what was found, through the
    same window.
    """
    grids = [tuple(one.scales for one in stored)]
    for mistake in chain:
        if isinstance(mistake.change, Scales):
            grids = [other for grid in grids for other in _rescaled(grid, mistake.change)]
    steps = [one.change for one in chain if isinstance(one.change, Changed)]
    for grid in grids:
        pairs = (Stored(one.values, scales) for one, scales in zip(stored, grid, strict=True))
        yield from _changed(tuple(decode(pair, config, window) for pair in pairs), steps, found, config)


def _rescaled(grid: tuple[Tensor | None, ...], change: Scales) -> Iterator[tuple[Tensor | None, ...]]:
    """Every way in which a change is made, the same for all tensors; none where nothing has scales."""
    if all(scales is None for scales in grid):
        return
    first = next(scales for scales in grid if scales is not None)
    ways = len(list(change.scales(first)))
    for way in range(ways):
        yield tuple(None if scales is None else list(change.scales(scales))[way] for scales in grid)


def _changed(right: Parts, steps: Sequence[Changed], found: Parts, config: ModelConfig) -> Iterator[Parts]:
    """One step after the other; what has lost its shape is only rounded."""
    if not steps:
        yield right
        return
    for made in steps[0].values(right, found, config):
        whole = all(a.shape == b.shape for a, b in zip(made, right, strict=True))
        if whole or all(isinstance(step, Rounded) for step in steps[1:]):
            yield from _changed(made, steps[1:], found, config)
