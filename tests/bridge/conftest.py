"""A small FP8 checkpoint on disk and what comes of it, made once a session; tests copy what they damage."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jaxtyping
import pytest
import torch
from support.checkpoints import EDGY_CONFIG, all_tensors
from support.conversions import Conversion, convert, export, export_job, import_job, imported_from
from support.folders import checksums
from torch import Tensor

from bridge.huggingface.random_checkpoint import make_checkpoint


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


@pytest.fixture(scope="session")
def source(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of the checkpoint."""
    return all_tensors(checkpoint)


@pytest.fixture(scope="session")
def imported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in bf16. Do not write to it."""
    return imported_from(checkpoint, tmp_path_factory.mktemp("imported") / "megatron")


@pytest.fixture(scope="session")
def plain(imported: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as bf16 Hugging Face files. Do not write to it."""
    out = tmp_path_factory.mktemp("plain") / "hf"
    export(imported, out, quantization="none", source=str(checkpoint))
    return out


@pytest.fixture(scope="session")
def conversions(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversion]:
    """What the tests of faults disturb."""
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs = {"import": partial(import_job, checkpoint), "export": partial(export_job, folder / "import", checkpoint)}
    for direction, job in jobs.items():
        convert(job(folder / direction))
    return {name: Conversion(job, folder / name, checksums(folder / name)) for name, job in jobs.items()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a run writes; it is alone in its folder."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "out"


@pytest.fixture(scope="module")
def types_unchecked() -> Iterator[None]:
    """Searching layouts is thousands of calls."""
    with patch.object(jaxtyping.config, "jaxtyping_disable", True):
        yield
