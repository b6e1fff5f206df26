"""A checkpoint for models that lie on several ranks."""

from pathlib import Path

import pytest
from support.sharded_models import CONFIG

from bridge.huggingface.random_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint of `sharded_models.CONFIG` in several files, with an MTP layer. Do not write to it."""
    folder = tmp_path_factory.mktemp("wide") / "source"
    make_checkpoint(folder, CONFIG, seed=5, mtp_layers=1, max_shard_bytes=2_000_000)
    return folder
