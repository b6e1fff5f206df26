"""Small FP8 checkpoints on disk, made once a session; tests copy what they damage."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import EDGY_CONFIG

from bridge.synthetic import make_checkpoint


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """These tensors are small, and waiting for a second thread costs more than it computes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint with edge blocks, several files and an MTP layer. Do not write to it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "edgy"
    make_checkpoint(folder, EDGY_CONFIG, mtp_layers=1, max_shard_bytes=150_000)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `checkpoint` to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))
