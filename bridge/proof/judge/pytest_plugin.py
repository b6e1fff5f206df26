"""A fixture for pytest; a conftest.py says `pytest_plugins = ["bridge.proof.judge.pytest_plugin"]`."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from bridge.proof.judge.assertion import assert_matches_reference
from bridge.proof.judge.judge import JudgesRanks
from bridge.proof.judge.verdict import Judgement


@pytest.fixture(scope="session")
def matches_reference() -> Iterator[Callable[..., Judgement]]:
    """`assert_matches_reference`, whose ranks stay for the whole session."""
    with JudgesRanks() as ranks:
        yield partial(assert_matches_reference, ranks=ranks)
