"""A torch_dist checkpoint of GPTModel becomes one of HybridModel and back: byte for byte what an import makes of it.

What megatron-core itself saves and loads of both is in `tests/bridge/model/test_dist_checkpointing.py`.
"""

import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import all_tensors
from support.conversions import UNIT_BYTES, assert_same_tensors, export, imported_from
from support.folders import contents
from torch.distributed.checkpoint import FileSystemWriter, save

from bridge.convert import hf_to_torch_dist
from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.proof.compare import compare_checkpoints
from bridge.torch_dist.checkpoint import MegatronCheckpoint
from reference.model_class import ModelClass


@pytest.fixture(params=ModelClass)
def both(request, checkpoint: Path, tmp_path: Path) -> tuple[Path, Path, ModelClass]:
    """A checkpoint of one class, one of the other, and what the other is."""
    other = next(kind for kind in ModelClass if kind is not request.param)
    return (
        imported_from(checkpoint, tmp_path / "one", model=request.param),
        imported_from(checkpoint, tmp_path / "other", model=other),
        other,
    )


def test_one_class_becomes_the_other_byte_for_byte(both, tmp_path: Path) -> None:
    one, other, kind = both
    made = imported_from(one, tmp_path / "made", model=kind)
    assert contents(made) == contents(other)
    assert contents(made) != contents(one)


def test_bands_of_rows_make_up_the_same_weights(both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a band begins and ends inside a key/value group, or in the gate's rows."""
    one, other, kind = both
    monkeypatch.setattr(hf_to_torch_dist, "CHUNK_BYTES", 15_000)
    made = imported_from(one, tmp_path / "made", model=kind)
    assert not compare_checkpoints(made, other).differences


def test_float32_stays_float32_unless_asked(checkpoint: Path, tmp_path: Path) -> None:
    wide = imported_from(checkpoint, tmp_path / "wide", dtype="fp32")
    found = {
        dtype: MegatronCheckpoint(imported_from(wide, tmp_path / str(dtype), model="hybrid", dtype=dtype))
        for dtype in (None, "bf16", "fp32")
    }
    name, router = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.block_sparse_moe.gate.weight"
    assert [found[dtype].dtype(name) for dtype in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert {found[dtype].dtype(router) for dtype in found} == {torch.float32}
    assert not compare_checkpoints(wide, tmp_path / "None").differences


def test_either_is_exported_to_the_sources_bytes(both, checkpoint: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(both[:2]):
        export(folder, tmp_path / str(number), source=str(checkpoint))
        assert_same_tensors(all_tensors(tmp_path / str(number)), all_tensors(checkpoint))


def test_verify_compares_the_classes(both, checkpoint: Path) -> None:
    one, other, _ = both
    found = compare_checkpoints(one, other)
    assert (found.differences, found.same_bytes) == ([], found.tensors)
    assert not compare_checkpoints(checkpoint, one).differences


def test_the_optimizers_tensors_are_counted_and_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint with states of an optimizer beside the weights."""
    imported = imported_from(checkpoint, tmp_path / "imported")
    weights = MegatronCheckpoint(imported)
    state = {key: weights.files.read(key, (0,) * len(shape), shape) for key, shape in weights.files.shapes.items()}
    state |= {f"optimizer.state.{what}.output_layer.weight": torch.ones(3) for what in ("exp_avg", "fp32_param")}
    save(state, storage_writer=FileSystemWriter(tmp_path / "trained"), no_dist=True)
    shutil.copy(imported / "iter_0000001/metadata.json", tmp_path / "trained")
    job = ImportJob(
        str(tmp_path / "trained"),
        str(tmp_path / "out"),
        model="hybrid",
        hugging_face=str(checkpoint),
        unit_bytes=UNIT_BYTES,
    )
    summary = import_checkpoint(job)
    assert summary.other_tensors == 2
    assert summary.bytes_read == sum(value.nbytes for key, value in state.items() if "optimizer" not in key)
    assert contents(tmp_path / "out") == contents(imported_from(checkpoint, tmp_path / "hybrid", model="hybrid"))


def test_what_cannot_be_meant_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="model must be one of 'gpt', 'hybrid', found 'mamba'"):
        import_checkpoint(job._replace(model="mamba"))
    with pytest.raises(ValueError, match="leave out hugging_face"):
        import_checkpoint(job._replace(hugging_face=str(checkpoint)))
    with pytest.raises(ValueError, match=r"dtype must be one of .* or None, found 'fp16'"):
        import_checkpoint(job._replace(dtype="fp16"))
    assert list(tmp_path.iterdir()) == []
