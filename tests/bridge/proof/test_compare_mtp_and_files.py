"""What is compared besides weights: trained MTP layers of distributed checkpoints, and files larger than memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import EDGY_CONFIG
from support.checks import ROOT
from torch import Tensor
from typer.testing import CliRunner

from bridge.cli import app
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
from bridge.proof import compare
from bridge.proof.compare import compare_checkpoints
from bridge.torch_dist.reader import TorchDistFolder
from reference.config import ModelConfig
from reference.dist_checkpoint import entries

KEYS = ("mtp.layers.0.enorm.weight", "mtp.layers.0.eh_proj.weight", "mtp.layers.0.transformer_layer.mlp.router.weight",
        "mtp.layers.1.mtp_model_layer.layers.0.mlp.experts.linear_fc1.weight")  # fmt: skip


def trained(imported: Path, out: Path, keys: tuple[str, ...] = KEYS, value: float = 1.0) -> Path:
    """The checkpoint as training with MTP saves it."""
    read = TorchDistFolder(imported)
    state: dict[str, Tensor] = {}
    for key in {entry.key for entry in entries(ModelConfig.from_hf(EDGY_CONFIG))}:
        shape = read.shapes[key]
        state[key] = read.read(key, (0,) * len(shape), shape)
    state |= {key: torch.full((3, 4, 5), value) for key in keys}
    state["optimizer.state.exp_avg.mtp.layers.0.enorm.weight"] = torch.zeros(2)
    dcp.save(state, checkpoint_id=out / "iter_0000007", no_dist=True)
    (out / "iter_0000007/metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (out / "latest_checkpointed_iteration.txt").write_text("7")
    return out


def test_export_never_drops_trained_mtp_without_a_word(imported: Path, checkpoint: Path, tmp_path: Path) -> None:
    megatron = trained(imported, tmp_path / "megatron")
    words = ["export", str(megatron), str(tmp_path / "hf"), "--source", str(checkpoint)]
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(app, [*words, *more, "--json"], env={"COLUMNS": "1000"})
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        assert (said["trained_mtp"], said["mtp_tensors"]) == (len(KEYS), 2)
        assert "not converted: 4 trained tensors of multi-token-prediction layers (mtp.layers.0." in result.stderr
        assert "the source's 2 MTP tensors are written instead" in result.stderr
    assert (
        "trained MTP tensors, not converted"
        in CliRunner().invoke(app, [*words[:2], "x", *words[3:], "--dry-run"]).output
    )


def test_without_a_source_that_has_them_none_are_written(
    imported: Path, checkpoint: Path, plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    megatron = trained(imported, tmp_path / "megatron")
    (megatron / "hugging_face").mkdir()
    (megatron / "hugging_face/config.json").write_bytes((checkpoint / "config.json").read_bytes())
    done = export_checkpoint(ExportJob(str(megatron), str(tmp_path / "hf"), scales="fresh"))
    assert (done.trained_mtp, done.mtp_tensors) == (len(KEYS), 0)
    assert "no MTP tensors are written" in caplog.text
    caplog.clear()
    done = export_checkpoint(ExportJob(str(imported), str(tmp_path / "other"), scales="fresh"))
    assert done.trained_mtp == 0
    assert "not converted" not in caplog.text


@pytest.mark.parametrize("piece_bytes", [2**28, 30])
def test_verify_lists_them(imported: Path, checkpoint: Path, tmp_path: Path, monkeypatch, piece_bytes: int) -> None:
    monkeypatch.setattr(compare, "MTP_PIECE_BYTES", piece_bytes)
    left = trained(imported, tmp_path / "left")
    for pair, side in (((left, checkpoint), "left"), ((checkpoint, left), "right")):
        found = compare_checkpoints(*pair).differences
        assert {(one.name, one.what) for one in found} == {
            (key, f"trained MTP tensor only on the {side}") for key in KEYS
        }
    same = trained(imported, tmp_path / "same")
    fewer = trained(imported, tmp_path / "fewer", KEYS[1:], value=2.0)
    for side in (left, same, fewer):
        (side / "hugging_face").mkdir()
        (side / "hugging_face/config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert compare_checkpoints(left, same).differences == []
    found = compare_checkpoints(left, fewer).differences
    assert {(one.name, one.what) for one in found} == {
        (KEYS[0], "trained MTP tensor only on the left"),
        *((key, "values differ") for key in KEYS[1:]),
    }


BOUNDED = """
import resource, sys
from pathlib import Path
from bridge.proof.compare import compare_checkpoints
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
for other in sys.argv[2:]:
    print([(one.name, one.what) for one in compare_checkpoints(sys.argv[1], other).differences])
"""


def test_carried_files_are_compared_in_bounded_memory(copy: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Two of 1 GiB, in a quarter of one: they differ in their last byte, then in length, then not."""
    others = [Path(shutil.copytree(copy, tmp_path / f"other{number}")) for number in range(3)]
    files = [(2**30, b""), (2**30, b"x"), (2**30 + 1, b""), (2**30, b"")]
    for folder, (length, last) in zip((copy, *others), files, strict=True):
        with (folder / "tokenizer.model").open("wb") as file:
            file.write(b"model")
            file.seek(length - len(last))
            file.write(last)
            file.truncate(length)
    words = [sys.executable, "-c", BOUNDED, str(copy), *map(str, others)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    different = str([("tokenizer.model", "the files differ")])
    assert run.stdout.splitlines() == [different, different, "[]"], run.stderr
