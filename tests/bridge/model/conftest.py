"""Ranks that most files of this folder share, each file its own."""

from collections.abc import Iterator

import pytest
from support.ranks import RankPool


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks
