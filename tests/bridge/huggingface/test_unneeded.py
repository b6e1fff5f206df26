"""Tensors that the model does not need, and files that the index does not name: carried or not read, and said once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import all_tensors, edit_tensors
from support.conversions import assert_same_tensors, export, imported_from
from torch import Tensor
from typer.testing import CliRunner

from bridge import MiniMaxM2Bridge
from bridge.cli import app
from bridge.model.process_groups import model_parallel
from bridge.proof.compare import compare_checkpoints

SCALES = ("k", "v", "q", "prob")
EXTRA: dict[str, Tensor] = {
    **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(12) for i in range(2)},
    **{
        f"model.layers.{i}.self_attn.{n}_scale": torch.tensor(0.5 + i)
        for i in range(2)
        for n in ("k", "v", "q", "prob")
    },
    "model.layers.0.self_attn.k_proj.output_scale": torch.tensor([1.5]),
    "model.layers.1.block_sparse_moe.experts.3.w2.input_scale": torch.tensor([0.25], dtype=torch.bfloat16),
}


@pytest.fixture
def calibrated(copy: Path) -> Path:
    edit_tensors(copy, lambda tensors: tensors.update(EXTRA))
    return copy


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Some are scalars."""
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in wanted.items()}
    assert_same_tensors(*({name: value.reshape(-1) for name, value in side.items()} for side in (found, wanted)))


def test_they_are_carried_from_file_to_file(calibrated: Path, imported: Path, tmp_path: Path):
    megatron = imported_from(calibrated, tmp_path / "megatron")
    for file in (imported / "iter_0000001").glob("*.distcp"):
        assert (megatron / "iter_0000001" / file.name).read_bytes() == file.read_bytes()
    for quantization in ("fp8", "none"):
        out = tmp_path / quantization
        export(megatron, out, quantization=quantization, source=str(calibrated))
        found = all_tensors(out)
        assert_same({name: found[name] for name in EXTRA}, EXTRA)
    assert_same(all_tensors(tmp_path / "fp8"), all_tensors(calibrated))
    assert compare_checkpoints(calibrated, tmp_path / "fp8").differences == []
    edit_tensors(calibrated, lambda tensors: tensors.update({next(iter(EXTRA)): torch.zeros(12)}))
    assert [one.name for one in compare_checkpoints(calibrated, tmp_path / "fp8").differences] == [next(iter(EXTRA))]


def test_a_live_model_carries_them(calibrated: Path, tmp_path: Path):
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(calibrated) as bridge:
        assert set(bridge.checkpoint.unneeded_tensors) == set(EXTRA)
        model = bridge.to_megatron_model()
        assert not EXTRA.keys() & dict(bridge.export_hf_weights(model)).keys()
        bridge.save_hf_pretrained(model, tmp_path / "out", max_shard_bytes=150_000)
    assert_same(all_tensors(tmp_path / "out"), all_tensors(calibrated))


def test_inspect_and_import_say_it_once(calibrated: Path, tmp_path: Path):
    result = CliRunner().invoke(app, ["inspect", "--json", str(calibrated)])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)["facts"]
    assert facts["not needed"].startswith("12 tensors, carried unchanged")
    assert facts["MTP layers"].startswith("2 tensors")
    result = CliRunner().invoke(app, ["import", str(calibrated), str(tmp_path / "out"), "--json"])
    assert json.loads(result.stdout)["unneeded_tensors"] == 12
    assert json.loads(result.stdout)["mtp_tensors"] == 2


def test_what_is_unknown_is_refused(calibrated: Path):
    edit_tensors(calibrated, lambda tensors: tensors.update({"model.layers.0.self_attn.g_scale": torch.ones(1)}))
    result = CliRunner().invoke(app, ["inspect", str(calibrated)])
    assert result.exit_code == 1
    assert "model.layers.0.self_attn.g_scale: unknown tensor" in result.stdout
    assert "1 problems" in result.stdout


def test_every_verb_says_once_what_is_not_read(copy: Path, imported: Path, tmp_path: Path):
    save_file({"lm_head.weight": torch.zeros(3)}, copy / "consolidated.safetensors")
    first = min(copy.glob("model-*.safetensors"))
    tensors = {name: value for name, value in all_tensors(copy).items() if name in _names(copy, first.name)}
    save_file(tensors | {"model.norm.weight": torch.zeros(160)}, first)
    before = sorted(path.name for path in copy.iterdir())
    megatron, source, out = str(imported), str(copy), str(tmp_path / "out")
    for arguments in (
        ["import", source, str(tmp_path / "megatron")],
        ["export", megatron, out, "--source", source],
        ["verify", source, out],
        ["roundtrip", source, "--tokens", "4"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (arguments, result.output)
        notes = [line for line in result.stderr.splitlines() if line.startswith("note: not read: ")]
        assert len(notes) == 2, arguments
        assert f"model.norm.weight in {first.name}" in notes[0]
        assert "consolidated.safetensors" in notes[1]
    result = CliRunner().invoke(app, ["inspect", source, "--json"])
    assert [note.startswith("not read: ") for note in json.loads(result.stdout)["notes"]] == [True, True]
    result = CliRunner().invoke(app, ["inspect", source])
    assert " ".join(result.stdout.split()).count("not read: ") == 2
    assert sorted(path.name for path in copy.iterdir()) == before


def _names(folder: Path, file: str) -> list[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return [name for name, where in index["weight_map"].items() if where == file]
