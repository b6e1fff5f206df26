"""`verify`: equal checkpoints pass whatever their format, and a single wrong bit is found and measured."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import EDGY_CONFIG, GATE, all_tensors, edit_config, edit_tensors
from typer.testing import CliRunner

from bridge.cli import app
from bridge.huggingface.random_checkpoint import make_checkpoint
from bridge.proof.compare import compare_checkpoints

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def test_a_copy_is_the_same(checkpoint: Path, copy: Path) -> None:
    edit_tensors(copy, lambda tensors: None)  # all in one file
    found = compare_checkpoints(checkpoint, copy)
    assert found.differences == []
    assert found.tensors == found.same_bytes == len(all_tensors(checkpoint))
    assert found.nbytes == sum(tensor.nbytes for tensor in all_tensors(checkpoint).values())


def test_formats_are_compared_by_value(checkpoint: Path, imported: Path, plain: Path) -> None:
    quantized = sum(name.endswith("_scale_inv") for name in all_tensors(checkpoint))
    for left, right, values in (
        (checkpoint, imported, quantized),
        (checkpoint, plain, quantized),
        (imported, plain, 0),
    ):
        for pair in ((left, right), (right, left)):
            found = compare_checkpoints(*pair)
            assert found.differences == []
            assert found.same_values == values
            assert found.same_bytes == found.tensors - values


@pytest.mark.parametrize("name", [EXPERT, EXPERT + "_scale_inv", GATE, "model.norm.weight", "lm_head.weight"])
def test_one_bit_is_found_and_named(checkpoint: Path, imported: Path, copy: Path, name: str) -> None:
    """Byte 6 is of a float32's leading ones, so that rounding to bfloat16 does not hide the change."""
    edit_tensors(copy, lambda tensors: tensors[name].view(torch.uint8).view(-1)[6:7].__ixor__(2))
    for other in (checkpoint, imported):
        for pair in ((other, copy), (copy, other)):
            (difference,) = compare_checkpoints(*pair).differences
            assert difference.name == name.removesuffix("_scale_inv")


def test_the_error_is_measured(checkpoint: Path, copy: Path) -> None:
    before = all_tensors(checkpoint)[GATE]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[GATE][0, 0] += 0.5
        tensors["model.norm.weight"] *= 2

    edit_tensors(copy, change)
    worst, other = compare_checkpoints(checkpoint, copy).differences
    assert (worst.name, other.name) == ("model.norm.weight", GATE)
    assert worst.relative == pytest.approx(1.0)
    assert other.largest == pytest.approx(0.5)
    assert other.relative == pytest.approx(0.5 / before.double().square().sum().sqrt().item())
    assert f"{1 / before.numel():.2%}" in other.what


def test_files_and_tensors_of_one_side_are_named(checkpoint: Path, copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop("model.layers.2.enorm.weight"))
    (copy / "generation_config.json").write_text("{}")
    (copy / "tokenizer.json").write_text("{}")
    edit_config(copy, lambda config: config.update(eos_token_id=3))
    named = {difference.name: difference.what for difference in compare_checkpoints(checkpoint, copy).differences}
    assert named == {
        "model.layers.2.enorm.weight": "tensor only on the left",
        "tokenizer.json": "file only on the right",
        "generation_config.json": "the files differ",
        "config.json": "the files differ",
    }


def test_other_sizes_are_an_error(checkpoint: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "larger", {**EDGY_CONFIG, "num_local_experts": 6})
    with pytest.raises(ValueError, match="different sizes"):
        compare_checkpoints(checkpoint, tmp_path / "larger")


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "300"})
    return result.exit_code, result.stdout + (result.stderr if result.exit_code == 2 else "")


def test_the_command(checkpoint: Path, imported: Path, copy: Path) -> None:
    status, text = run("verify", checkpoint, imported, "--logits", "--tokens", "5, 17 3")
    assert status == 0
    assert "0.00e+00" in text
    edit_tensors(copy, lambda tensors: tensors[GATE].mul_(1.5))
    status, text = run("verify", checkpoint, copy, "--json", "--logits")
    found = json.loads(text)
    assert status == 1
    assert found["differ"] == 1
    assert found["differences"][0]["name"] == GATE
    assert found["differences"][0]["relative"] == pytest.approx(0.5)
    assert found["logits_error"] > 0
    assert GATE in "".join(run("verify", checkpoint, copy)[1].split())


def test_the_command_names_bad_tokens_and_paths(checkpoint: Path, tmp_path: Path) -> None:
    for tokens in ("1 two", "131", "-1"):
        status, text = run("verify", checkpoint, checkpoint, "--logits", "--tokens", tokens)
        assert status == 2
        assert "expected ids from 0 to 130" in " ".join(text.split())
    status, text = run("verify", checkpoint, tmp_path)
    assert status == 2
    assert str(tmp_path) in text.replace("\n", "")


def test_import_and_export_by_command(checkpoint: Path, tmp_path: Path) -> None:
    middle, back = tmp_path / "megatron", tmp_path / "back"
    status, text = run("import", checkpoint, middle, "--dry-run", "--json")
    assert status == 0
    assert not middle.exists()
    assert json.loads(text)["dry_run"] is True
    assert run("import", checkpoint, middle)[0] == 0
    status, text = run("import", checkpoint, middle)
    assert status == 2
    assert "is not empty" in text
    status, text = run("export", middle, back)
    assert status == 2
    assert "give source" in " ".join(text.split())
    status, text = run("export", middle, back, "--source", checkpoint, "--json")
    assert status == 0
    summary = json.loads(text)
    quantized = sum(name.endswith("_scale_inv") for name in all_tensors(checkpoint))
    assert (summary["identical"], summary["requantised"]) == (quantized, 0)
    assert run("verify", checkpoint, back)[0] == 0
    shutil.rmtree(back)
    status, text = run("export", middle, back, "--scales", "fresh")
    assert status == 0
    assert "encoded anew" in text
    assert run("verify", checkpoint, back)[0] == 1
