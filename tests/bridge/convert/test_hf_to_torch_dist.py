"""Import without a model: Megatron-LM's folder with the dequantised weights, also from a run that was interrupted.

What a checkpoint holds is read by torch.distributed.checkpoint's own reader; what it should hold is `reference.fp8`'s.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import EDGY_CONFIG, all_tensors
from support.conversions import UNIT_BYTES, assert_same_tensors, dequantised, export, imported_from
from support.folders import contents
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from bridge.convert import hf_to_torch_dist
from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.jobs.staging import Staging
from reference.config import ModelConfig
from reference.dist_checkpoint import entries
from reference.sharding import shard

CONFIG = ModelConfig.from_hf(EDGY_CONFIG)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_torch_reads_the_dequantised_weights(
    imported: Path, checkpoint: Path, source: dict, tmp_path: Path, dtype: str
) -> None:
    folder = imported if dtype == "bf16" else imported_from(checkpoint, tmp_path / "megatron", dtype="fp32")
    wide = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    weights = dequantised(source, wide)
    wanted: dict[str, Tensor] = {}
    for entry in entries(CONFIG):
        kept = torch.float32 if "router" in entry.key else wide
        whole = wanted.setdefault(entry.key, torch.full(entry.shape, torch.nan, dtype=kept))
        whole[entry.index] = shard(entry.parameter, weights).to(kept)
    found = {key: torch.empty_like(value) for key, value in wanted.items()}
    reader = FileSystemReader(folder / "iter_0000001")
    dcp.load(found, storage_reader=reader, no_dist=True)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
        assert reader.read_metadata().state_dict_metadata[key].properties.dtype == value.dtype


def test_the_folder_is_one_that_megatron_lm_knows(imported: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert set(os.listdir(imported)) == {"latest_checkpointed_iteration.txt", "iter_0000001", "hugging_face"}
    assert (imported / "latest_checkpointed_iteration.txt").read_text() == "1"
    names = set(os.listdir(imported / "iter_0000001"))
    files = {name for name in names if name.endswith(".distcp")}
    assert len(files) > 4, "several units"
    assert names == {*files, ".metadata", "metadata.json", "minimax_m2.json"}
    carried = {name: data for name, data in contents(checkpoint).items() if "safetensors" not in name}
    assert contents(imported / "hugging_face") == carried
    assert "chat_template.jinja" in carried
    other = imported_from(checkpoint, tmp_path / "other", iteration=250)
    assert (other / "latest_checkpointed_iteration.txt").read_text() == "250"
    assert (other / "iter_0000250/.metadata").is_file()
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_units_say_only_how_the_bytes_are_spread(imported: Path, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """One file, or many with bands of rows of one weight: torch reads the same, and so do we."""
    read, counts = [], []
    for number, (unit_bytes, chunk_bytes) in enumerate([(10**9, 2**26), (200_000, 15_000)]):
        monkeypatch.setattr(hf_to_torch_dist, "CHUNK_BYTES", chunk_bytes)
        folder = imported_from(checkpoint, tmp_path / str(number), unit_bytes=unit_bytes) / "iter_0000001"
        found = {entry.key: torch.empty(entry.shape) for entry in entries(CONFIG)}
        dcp.load(found, storage_reader=FileSystemReader(folder), no_dist=True)
        read.append(found)
        counts.append(len(list(folder.glob("*.distcp"))))
    assert counts[0] == 2 < counts[1]
    assert all(torch.equal(value, read[0][key]) for key, value in read[1].items())
    export(tmp_path / "1", tmp_path / "hf", source=str(checkpoint))
    assert_same_tensors(all_tensors(tmp_path / "hf"), all_tensors(checkpoint))


def test_an_interrupted_import_is_taken_up(imported: Path, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=UNIT_BYTES)
    write_chunks = hf_to_torch_dist.write_chunks

    def full_disk(folder: Path, unit: int, chunks: list) -> list:
        if unit == 3:
            raise OSError(28, "No space left on device")
        return write_chunks(folder, unit, chunks)

    monkeypatch.setattr(hf_to_torch_dist, "write_chunks", full_disk)
    with pytest.raises(OSError, match="No space left"):
        import_checkpoint(job)
    monkeypatch.setattr(hf_to_torch_dist, "write_chunks", write_chunks)
    assert not (tmp_path / "out").exists()
    summary = import_checkpoint(job)
    assert summary.reused == 3
    assert contents(tmp_path / "out") == contents(imported)
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_killed_after_its_last_rename_is_known_to_be_complete(
    imported: Path, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=UNIT_BYTES)

    def killed(staging: Staging) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "forget", killed)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoint(job)
    assert sorted(os.listdir(tmp_path)) == [".out.journal", "out"]
    with pytest.raises(ValueError, match="is not empty"):  # another job
        import_checkpoint(job._replace(dtype="fp32"))
    summary = import_checkpoint(job)
    assert summary.reused == len(list((tmp_path / "out").rglob("*.distcp")))
    assert contents(tmp_path / "out") == contents(imported)
    assert os.listdir(tmp_path) == ["out"]


def test_a_complete_output_that_was_changed_is_not_called_complete(
    checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=UNIT_BYTES)
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "forget", lambda staging: None)
        import_checkpoint(job)
    (tmp_path / "out/iter_0000001/__1_0.distcp").unlink()
    with pytest.raises(ValueError, match="changed since"):
        import_checkpoint(job)
