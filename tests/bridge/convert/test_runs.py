"""An import or export without a model as a run: what it says beforehand, when it is on the disk, and that workers and
ranks write the bytes that one process writes.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import EDGY_CONFIG, SCALE, W2, all_tensors, edit_tensors
from support.checks import ROOT
from support.conversions import SHARD_BYTES, UNIT_BYTES, assert_same_tensors, export, imported_from
from support.folders import contents

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
from bridge.jobs.durable import footprint
from reference.config import ModelConfig
from reference.dist_checkpoint import entries

CONFIG = ModelConfig.from_hf(EDGY_CONFIG)


def test_a_dry_run_says_the_same_and_writes_nothing(imported: Path, checkpoint: Path, tmp_path: Path) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "megatron"), unit_bytes=UNIT_BYTES)
    said = import_checkpoint(job, dry_run=True)
    assert os.listdir(tmp_path) == []
    assert said == import_checkpoint(job)
    assert (said.bytes_written, said.files) == footprint(tmp_path / "megatron"), "whatever is written is counted"
    values = sum(math.prod(shape) for shape in {entry.key: entry.shape for entry in entries(CONFIG)}.values())
    router = 2 * 5 * (160 + 1)
    weights = 2 * values + 2 * router
    assert weights < said.bytes_written, "bfloat16, but for the routers"
    assert said.mtp_tensors == 2
    shutil.rmtree(tmp_path / "megatron")
    hf = ExportJob(str(imported), str(tmp_path / "hf"), source=str(checkpoint), max_shard_bytes=SHARD_BYTES)
    planned = export_checkpoint(hf, dry_run=True)
    assert os.listdir(tmp_path) == []
    done = export_checkpoint(hf)
    assert planned == done._replace(identical=0)
    assert (planned.bytes_written, planned.files) == footprint(tmp_path / "hf")
    assert planned.bytes_read == weights


@pytest.mark.parametrize("what", ["import", "export"])
def test_everything_is_on_the_disk_before_it_is_in_place(
    imported: Path, checkpoint: Path, tmp_path: Path, monkeypatch, what: str
) -> None:
    synced: dict[int, int] = {}
    fsync = os.fsync

    def record(handle: int) -> None:
        found = os.fstat(handle)
        synced[found.st_ino] = found.st_mtime_ns
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", record)
        if what == "import":
            imported_from(checkpoint, tmp_path / "out")
        else:
            export(imported, tmp_path / "out", source=str(checkpoint))
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert path.stat().st_ino in synced, f"{path.relative_to(tmp_path)} was never synced"
        if path.is_file():
            assert synced[path.stat().st_ino] == path.stat().st_mtime_ns, f"{path.name} was written to afterwards"


# ------------------------------------------------------------------------------------------------------ many processes


@pytest.mark.slow  # two workers also run, and are killed, in test_processes_killed
def test_two_workers_write_the_same_bytes(imported: Path, plain: Path, checkpoint: Path, tmp_path: Path) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "megatron"), unit_bytes=UNIT_BYTES)
    import_checkpoint(job, workers=2)
    assert contents(tmp_path / "megatron") == contents(imported)
    job = ExportJob(str(imported), str(tmp_path / "hf"), "none", source=str(checkpoint), max_shard_bytes=SHARD_BYTES)
    export_checkpoint(job, workers=2)
    assert contents(tmp_path / "hf") == contents(plain)
    assert sorted(os.listdir(tmp_path)) == ["hf", "megatron"]


TORCHRUN = """
import os, sys
from bridge import ExportJob, ImportJob, export_checkpoint, import_checkpoint
from bridge.jobs.ranks import TorchrunRanks, is_rank_zero
from pathlib import Path

def error_of(job):
    try:
        import_checkpoint(job)
    except ValueError as caught:
        return str(caught)
    return "none"

if __name__ == "__main__":
    import torch
    source, damaged, out = map(Path, sys.argv[1:4])
    unit_bytes, shard_bytes = map(int, sys.argv[4:])
    import_checkpoint(ImportJob(str(source), str(out / "megatron"), unit_bytes=unit_bytes))
    job = ExportJob(str(out / "megatron"), str(out / "hf"), source=str(source), max_shard_bytes=shard_bytes)
    said = export_checkpoint(job)
    wrong = ImportJob(str(damaged), str(out / "damaged"), unit_bytes=unit_bytes)
    error = error_of(wrong)
    assert not torch.distributed.is_initialized()
    with TorchrunRanks():
        import_checkpoint(ImportJob(str(source), str(out / "again"), unit_bytes=unit_bytes))
        assert error_of(wrong) == error
        assert torch.distributed.get_world_size() == 2
    files = len(list((out / "megatron").rglob("*.distcp")))
    (out / f"rank{os.environ['RANK']}").write_text(f"{is_rank_zero()} {files} {said.identical}\\n{error}")
"""


def test_torchruns_ranks_write_the_same_bytes(
    imported: Path, checkpoint: Path, source: dict, copy: Path, tmp_path: Path
) -> None:
    """In the process group that there is, or in one of their own. An error that one of them meets is every rank's."""
    out, script = tmp_path / "out", tmp_path / "script.py"
    out.mkdir()
    script.write_text(TORCHRUN)
    edit_tensors(copy, lambda tensors: tensors[W2 + SCALE].fill_(-1))
    arguments = [str(checkpoint), str(copy), str(out), str(UNIT_BYTES), str(SHARD_BYTES)]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            *arguments,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    assert contents(out / "megatron") == contents(imported)
    assert contents(out / "again") == contents(imported)
    assert_same_tensors(all_tensors(out / "hf"), source)
    said = [(out / f"rank{rank}").read_text().split("\n", 1) for rank in range(2)]
    counts = f"{len(list((imported / 'iter_0000001').glob('*.distcp')))} {sum(name.endswith(SCALE) for name in source)}"
    assert [first for first, _ in said] == [f"True {counts}", f"False {counts}"]
    assert said[0][1] == said[1][1]
    assert f"{W2}{SCALE}: scale of block [0, 0] is -1.0" in said[0][1]
    assert not (out / "damaged").exists()
