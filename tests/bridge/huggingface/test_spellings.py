"""quantization_config as tools write it, or do not: the files decide what is read, and what is written is the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import EDGY_CONFIG, all_tensors, edit_config, edit_tensors
from support.conversions import assert_same_tensors, dequantised, export, imported_from
from typer.testing import CliRunner

from bridge import MiniMaxM2Bridge
from bridge.cli import app
from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.quantization import FP8_SECTION, storage_plan
from bridge.huggingface.writer import plan_files
from bridge.model.process_groups import model_parallel
from bridge.proof.compare import compare_checkpoints
from reference.config import ModelConfig
from reference.fp8 import FP8, quantize_blockwise
from reference.quantization import quantized_names

SCALE = "_scale_inv"
SECTION = "quantization_config"
Q = "model.layers.1.self_attn.q_proj.weight"


def listing(*modules: str, key: str = "modules_to_not_convert", **more: Any) -> dict[str, Any]:
    section = {name: value for name, value in FP8_SECTION.items() if name != "modules_to_not_convert"}
    return section | {key: list(modules)} | more


# Sections over the same float8 files, in which lm_head, embedding, norms and router are plain. `...` is no section.
OVER_FLOAT8: dict[str, Any] = {
    "none": ...,
    "null": None,
    "empty": {},
    "no list": {key: value for key, value in FP8_SECTION.items() if key != "modules_to_not_convert"},
    "list null": {**FP8_SECTION, "modules_to_not_convert": None},
    "empty list": listing(),
    "without lm_head": listing("gate", "e_score_correction_bias"),
    "suffixes": listing("mlp.gate", "lm_head", "embed_tokens", "norm"),
    "one by one": listing(*(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2)), "lm_head"),
    "layer prefixes": listing("model.layers.0", "lm_head"),  # names layers that are float8
    "expressions": listing(r"model\.layers\.\d+\.mlp\.gate.*", r"re:.*lm_head"),
    "no expressions": listing("*.gate", "lm_head"),
    "in memory": listing("model.layers.0.mlp.gate", "model.layers.1.mlp.gate.e_score_correction_bias", "lm_head"),
    "the alias": listing("lm_head", "gate", key="ignored_layers"),
    "both names": listing("lm_head", "gate", ignored_layers=["gate", "lm_head"]),
    "everything": listing("model", "lm_head"),
    "unknown keys": listing("gate", "lm_head", packed_by="a tool", dequantize=False),
}


def with_section(folder: Path, section: Any) -> None:
    edit_config(folder, lambda c: c.pop(SECTION, None) if section is ... else c.update({SECTION: section}))


@pytest.mark.parametrize("section", OVER_FLOAT8.values(), ids=OVER_FLOAT8)
def test_float8_files_come_back_byte_for_byte_under_any_section(section, copy: Path, imported: Path, tmp_path: Path):
    with_section(copy, section)
    assert CliRunner().invoke(app, ["inspect", str(copy)]).exit_code == 0
    with HuggingFaceCheckpoint(copy) as checkpoint:
        assert checkpoint.quantized == {name.removesuffix(SCALE) for name in checkpoint.files.tensors if SCALE in name}
    megatron = imported_from(copy, tmp_path / "megatron")
    said = export(megatron, tmp_path / "out", source=str(copy))
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(copy))
    assert (said.requantised, said.identical) == (0, len(checkpoint.quantized))
    written = json.loads((tmp_path / "out/config.json").read_text())
    if section in (..., None, {}):
        assert written == json.loads((copy / "config.json").read_text()) | {SECTION: FP8_SECTION}
    else:
        assert (tmp_path / "out/config.json").read_bytes() == (copy / "config.json").read_bytes()
    assert compare_checkpoints(copy, tmp_path / "out").differences == []


@pytest.mark.parametrize("case", ["none", "null", "without lm_head", "everything", "no expressions"])
def test_a_live_model_goes_back_to_the_source_s_own_storage(case: str, copy: Path, tmp_path: Path):
    with_section(copy, OVER_FLOAT8[case])
    source = all_tensors(copy)
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(copy) as bridge:
        model = bridge.to_megatron_model()
        for dtype in ("fp8", "source"):
            stream = dict(bridge.export_hf_weights(model, dtype, device="cpu"))
            own = {name: value for name, value in source.items() if name not in bridge.checkpoint.mtp_tensors}
            assert_same_tensors(stream, own)
        bridge.save_hf_pretrained(model, tmp_path / "out")
        bridge.save_hf_pretrained(model, tmp_path / "plain", quantization=None)
    assert_same_tensors(all_tensors(tmp_path / "out"), source)
    assert_same_tensors(all_tensors(tmp_path / "plain"), dequantised(source))
    assert json.loads((tmp_path / "out/config.json").read_text())[SECTION]["quant_method"] == "fp8"
    assert not json.loads((tmp_path / "plain/config.json").read_text()).get(SECTION)


# Sections over the same files in bfloat16, and the ends of the module names that the rule then leaves plain.
OVER_BFLOAT16: dict[str, tuple[Any, tuple[str, ...]]] = {
    "none": (..., ("lm_head",)),
    "null": (None, ("lm_head",)),
    "empty": ({}, ("lm_head",)),
    "left over": (FP8_SECTION, ("lm_head",)),
    "left over, empty list": (listing(), ()),
    "left over, without lm_head": (listing("gate"), ()),
    "left over, suffixes": (listing("o_proj", "w2", "lm_head"), ("o_proj", "w2", "lm_head")),
    "left over, the alias": (listing("q_proj", key="ignored_layers"), ("q_proj",)),
    "left over, in memory": (listing("mlp.experts", "lm_head"), ("w1", "w2", "w3", "lm_head")),
}


@pytest.mark.parametrize(("section", "kept"), OVER_BFLOAT16.values(), ids=OVER_BFLOAT16)
def test_bfloat16_files_are_read_under_any_section_and_quantised_by_the_rule(
    section, kept: tuple[str, ...], plain: Path, imported: Path, tmp_path: Path
):
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with_section(folder, section)
    assert CliRunner().invoke(app, ["inspect", str(folder)]).exit_code == 0
    with HuggingFaceCheckpoint(folder) as checkpoint:
        assert checkpoint.quantized == frozenset()
    megatron = imported_from(folder, tmp_path / "megatron")
    for file in (imported / "iter_0000001").glob("*.distcp"):
        assert (megatron / "iter_0000001" / file.name).read_bytes() == file.read_bytes()
    export(megatron, tmp_path / "out", scales="fresh", source=str(folder))
    source, found = all_tensors(folder), all_tensors(tmp_path / "out")
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3", "lm_head"}
    matrices = {name for name in source if name.split(".")[-2] in linear}
    wanted = dict(source)
    for name in matrices:
        if name.split(".")[-2] not in kept:
            wanted[name], wanted[name + SCALE] = quantize_blockwise(source[name])
    assert_same_tensors(found, wanted)
    section = section if section not in (..., None, {}) else FP8_SECTION
    assert json.loads((tmp_path / "out/config.json").read_text())[SECTION] == section
    export(megatron, tmp_path / "none", quantization="none", source=str(folder))
    assert_same_tensors(all_tensors(tmp_path / "none"), source)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (listing(".*"), "excludes every weight"),
        (listing("model", "lm_head"), "excludes every weight"),
        (listing("*.gate"), "is not a regular expression"),
    ],
)
def test_float8_that_cannot_be_had_is_refused(section, message: str, plain: Path, imported: Path, tmp_path: Path):
    """What was asked for is not written: nothing is written."""
    edit = json.loads((plain / "config.json").read_text()) | {SECTION: section}
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(edit))
    arguments = ["export", str(imported), str(tmp_path / "out"), "--scales", "fresh", "--source", str(folder)]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert message in result.stderr
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
        model = bridge.to_megatron_model()
        for write in (bridge.export_hf_weights, lambda m, _: bridge.save_hf_pretrained(m, tmp_path / "out")):
            with pytest.raises(ValueError, match=message):
                write(model, "fp8")
    assert not (tmp_path / "out").exists()


def test_float8_of_any_matrix_is_read_and_kept(copy: Path, tmp_path: Path):
    """Head, embedding and router in float8; some attention in bfloat16: what is written is that again."""
    chosen = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.block_sparse_moe.gate.weight"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        values = dequantised({name: tensors[name] for name in (Q, Q + SCALE)})
        del tensors[Q + SCALE]
        tensors[Q] = values[Q]
        for name in chosen:
            tensors[name], tensors[name + SCALE] = quantize_blockwise(tensors[name])

    edit_tensors(copy, change)
    with_section(copy, None)
    source = all_tensors(copy)
    export(imported_from(copy, tmp_path / "megatron"), tmp_path / "out", source=str(copy))
    assert_same_tensors(all_tensors(tmp_path / "out"), source)
    written = json.loads((tmp_path / "out/config.json").read_text())
    rule = quantized_names(ModelConfig.from_hf(written))
    assert "lm_head.weight" in rule
    assert Q not in rule
    assert {name for name in rule if name.startswith("model.layers.1")} == {
        name for name, value in source.items() if value.dtype == FP8 and name.startswith("model.layers.1")
    }
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(copy) as bridge:
        bridge.save_hf_pretrained(bridge.to_megatron_model(), tmp_path / "live")
    assert_same_tensors(all_tensors(tmp_path / "live"), source)


def test_a_plan_says_what_was_asked_for_and_is_held_against_the_files():
    plan = storage_plan(EDGY_CONFIG, "fp8")
    float8 = plan.stored_tensors(Q, (288, 160), torch.bfloat16)
    plain = storage_plan(EDGY_CONFIG, "none").stored_tensors(Q, (288, 160), torch.bfloat16)
    plan.check(plan_files([float8]), set())
    with pytest.raises(ValueError, match="'fp8' was asked for, and 0 weights"):
        plan.check(plan_files([plain]), set())
    with pytest.raises(ValueError, match="'fp8' was asked for"):
        plan.check(plan_files([float8]), {Q})
    with pytest.raises(ValueError, match="'none' was asked for, and 1 weights"):
        storage_plan(EDGY_CONFIG, "none").check(plan_files([float8]), set())
