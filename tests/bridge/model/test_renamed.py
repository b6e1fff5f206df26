"""Copies of functions in which a name means something else; the functions stay as they are."""

import functools
import math
from collections.abc import Callable

import pytest

from bridge.model.renamed import with_names


def twice(x: float, *, offset: float = 1) -> Callable[[], float]:
    def inner() -> float:
        return 2 * math.sqrt(x) + offset

    return inner


class Fake:
    @staticmethod
    def sqrt(x: float) -> float:
        return 100 * x


def test_a_name_is_another_inside_and_defaults_are_kept() -> None:
    copy = with_names(twice, math=Fake)
    assert copy(4)() == 801
    assert copy(4, offset=0)() == 800
    assert twice(4)() == 5


def test_what_would_replace_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"test_renamed.twice does not use cmath; megatron-core 0.19 does"):
        with_names(twice, cmath=Fake)
    with pytest.raises(ValueError, match=r"twice does not use pytest;"):  # the module has it, the function not
        with_names(twice, pytest=Fake)
    with pytest.raises(ValueError, match=r"must be a plain function of its module"):
        with_names(functools.partial(twice, 4), math=Fake)
    with pytest.raises(ValueError, match=r"must be a plain function of its module"):
        with_names(twice(4), math=Fake)
