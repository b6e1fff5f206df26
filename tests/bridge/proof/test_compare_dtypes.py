"""Weights that are no floating-point numbers, in a distributed checkpoint: found by `verify`, refused by `export`."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from support.conversions import export
from torch.distributed.checkpoint.metadata import MetadataIndex
from typer.testing import CliRunner

from bridge.cli import app
from bridge.proof.compare import compare_checkpoints

KEY, NAME = "decoder.final_layernorm.weight", "model.norm.weight"
DTYPES = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn]


def store(megatron: Path, dtype: torch.dtype) -> Path:
    """The final norm in another dtype, in a file of its own, as the metadata says."""
    folder = megatron / "iter_0000001"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata[KEY]
    torch.save(torch.ones(entry.size).to(dtype), folder / "other.distcp")
    entry.properties.dtype = dtype
    (index,) = (index for index in metadata.storage_data if index.fqn == KEY)
    info = metadata.storage_data[MetadataIndex(KEY, index.offset)]
    info.relative_path, info.offset, info.length = "other.distcp", 0, (folder / "other.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return megatron


@pytest.fixture(params=DTYPES, ids=str)
def megatron(imported: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return store(Path(shutil.copytree(imported, tmp_path / "megatron")), request.param)


def test_verify_finds_a_difference(megatron: Path, checkpoint: Path) -> None:
    for pair in ((megatron, checkpoint), (checkpoint, megatron), (megatron, megatron)):
        (difference,) = compare_checkpoints(*pair).differences
        assert difference.name == NAME
        assert "expected bfloat16, float16 or float32" in difference.what
    result = CliRunner().invoke(app, ["verify", str(megatron), str(checkpoint)])
    assert result.exit_code == 1, result.output


def test_export_refuses(megatron: Path, checkpoint: Path, tmp_path: Path) -> None:
    for quantization in ("fp8", "none"):
        with pytest.raises(ValueError, match=rf"{KEY}: found torch\.\w+ in .*, expected one of torch.bfloat16"):
            export(megatron, tmp_path / "out", source=str(checkpoint), quantization=quantization)
    assert not (tmp_path / "out").exists()
