"""What most files of this folder start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ranks import RankPool
from support.training_runs import make_source, training_ranks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "hf", fp8=False, num_hidden_layers=2)


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    with training_ranks(2) as ranks:
        yield ranks
