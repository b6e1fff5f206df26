"""Every bad checkpoint is refused by name, through the bridge and through the command, and nothing is written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import EDGY_CONFIG, GATE, SCALE, W2, Q, edit_config, edit_tensors
from typer.testing import CliRunner

from bridge import MiniMaxM2Bridge
from bridge.cli import app
from bridge.huggingface.safetensors_folder import INDEX_NAME
from bridge.proof.reference_logits import random_tokens
from bridge.proof.roundtrip import roundtrip


def config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda c: c.update(changes))


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def setting(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({name: make(t[name])}))


def one_scale(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale = scale.clone()
        scale[-1, -1] = value
        return scale

    return change


def nan_code(weight: torch.Tensor) -> torch.Tensor:
    codes = weight.view(torch.uint8).clone()
    codes[3, 5] = 0xFF
    return codes.view(torch.float8_e4m3fn)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    data = first_shard(folder).read_bytes()
    first_shard(folder).write_bytes(data[:-7])


def edit_index(change: Callable[[dict, list[str]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / INDEX_NAME
        index = json.loads(path.read_text())
        change(index["weight_map"], sorted(set(index["weight_map"].values())))
        path.write_text(json.dumps(index))

    return apply


# What is done to the checkpoint; what the error must name: tensor or key, what was found, what was expected.
REFUSED_ON_OPENING: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (lambda folder: first_shard(folder).unlink(), ["model-00001-of-", "not there"]),
    "truncated shard": (truncate, ["model-00001-of-", "truncated"]),
    "index names an absent tensor": (
        edit_index(lambda names, files: names.update({"model.extra": files[0]})),
        ["model.extra", "model-00001-of-"],
    ),
    "wrong shape": (setting(GATE, lambda w: w[:-1]), [GATE, "[4, 160]", "[5, 160]"]),
    "wrong dtype": (setting(GATE, lambda w: w.to(torch.int32)), [GATE, "int32", "float32"]),
    "scales left over": (setting(Q, torch.Tensor.bfloat16), [Q, "bfloat16", "float8_e4m3fn"]),
    "missing scales": (tensors(lambda t: t.pop(Q + SCALE)), [Q + SCALE, "missing"]),
    "scale grid too small": (setting(Q + SCALE, lambda s: s[:, :1]), [Q, "[3, 1]", "[3, 2]"]),
    "scale grid too large": (
        setting(Q + SCALE, lambda s: torch.cat([s, s])),
        [Q + SCALE, "[6, 2]", "[3, 2]"],
    ),
    **{
        f"scales in {dtype}": (
            setting(Q + SCALE, lambda s, dtype=dtype: s.to(dtype)),
            [Q + SCALE, f"found dtype {str(dtype).removeprefix('torch.')}", "store the scales as float32"],
        )
        for dtype in (torch.float64, torch.float8_e4m3fn, torch.uint8)
    },
    "unknown scale_fmt": (
        config(quantization_config=EDGY_CONFIG["quantization_config"] | {"scale_fmt": "e5m3"}),
        ["scale_fmt", "e5m3", "ue8m0"],
    ),
    "scales without their tensor": (
        tensors(lambda t: t.update({"model.layers.0.mystery.weight_scale_inv": torch.ones(1, 1)})),
        ["model.layers.0.mystery.weight_scale_inv", "without their tensor"],
    ),
    "layers that config does not count": (
        config(num_hidden_layers=1, num_mtp_modules=3),
        ["model.layers.1.", "num_hidden_layers", "at least 2"],
    ),
    "too many MTP layers": (config(num_mtp_modules=0), ["model.layers.2.enorm.weight", "num_mtp_modules"]),
    "attn_type_list of another length": (config(attn_type_list=[1, 1, 1]), ["attn_type_list", "3", "2"]),
    "missing tensor": (tensors(lambda t: t.pop(W2)), [W2, "missing"]),
    "unknown tensor": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(3)})),
        ["model.layers.0.self_attn.q_proj.bias", "unknown"],
    ),
    "RoPE scaling": (config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["rope_type", "yarn", "default"]),
    "heads do not divide": (config(num_key_value_heads=4), ["num_attention_heads (6)", "num_key_value_heads (4)"]),
    "rotary wider than a head": (config(rotary_dim=64), ["rotary_dim", "64", "48"]),
    "odd rotary": (config(rotary_dim=23), ["rotary_dim", "23", "even"]),
    "unknown quant_method": (config(quantization_config={"quant_method": "awq"}), ["quant_method", "awq", "fp8"]),
    "other block size": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
        ["_scale_inv", "[3, 2]", "[5, 3]", "weight_block_size"],
    ),
    "oblong blocks": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [1, 128]}),
        ["weight_block_size", "[1, 128]"],
    ),
    "config missing": (lambda folder: (folder / "config.json").unlink(), ["config.json", "not there"]),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "config not an object": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json", "object"]),
    "another model": (config(model_type="mixtral"), ["model_type", "mixtral", "minimax_m2"]),
    "neither rotary dialect": (lambda folder: edit_config(folder, lambda c: c.pop("rotary_dim")), ["rotary_dim"]),
}

REFUSED_ON_READING: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "NaN scale": (setting(Q + SCALE, one_scale(float("nan"))), [Q + SCALE, "[2, 1]", "nan"]),
    "infinite scale": (setting(Q + SCALE, one_scale(float("inf"))), [Q + SCALE, "[2, 1]", "inf"]),
    "zero scale": (setting(W2 + SCALE, one_scale(0.0)), [W2 + SCALE, "[1, 0]", "0.0"]),
    "negative scale": (setting(W2 + SCALE, one_scale(-0.5)), [W2 + SCALE, "[1, 0]", "-0.5"]),
    "NaN code": (setting(Q, nan_code), [Q, "[3, 5]", "NaN"]),
}


@pytest.mark.parametrize("damage", REFUSED_ON_OPENING)
def test_refused_on_opening(copy: Path, tmp_path: Path, damage: str) -> None:
    spoil, mentions = REFUSED_ON_OPENING[damage]
    spoil(copy)
    with pytest.raises(ValueError, match=re.escape(mentions[0])):
        MiniMaxM2Bridge.from_hf_pretrained(copy)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["roundtrip", str(copy), "--out", str(out)])
    assert result.exit_code == 2
    for mention in mentions:
        assert mention in result.stderr
    assert "Traceback" not in result.stderr
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("damage", REFUSED_ON_READING)
def test_refused_on_reading(copy: Path, tmp_path: Path, damage: str) -> None:
    spoil, mentions = REFUSED_ON_READING[damage]
    spoil(copy)
    with MiniMaxM2Bridge.from_hf_pretrained(copy) as bridge, pytest.raises(ValueError, match="fetch") as caught:
        roundtrip(bridge, tmp_path / "out", random_tokens(bridge.config, length=4))
    for mention in mentions:
        assert mention in str(caught.value)
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_undamaged_is_accepted(copy: Path) -> None:
    """The tables above prove nothing if rewriting the files is what is refused."""
    edit_tensors(copy, lambda t: None)
    edit_config(copy, lambda c: None)
    with MiniMaxM2Bridge.from_hf_pretrained(copy) as bridge:
        assert len(bridge.checkpoint.mtp_tensors) == 2


def test_output_folder_not_empty(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    result = CliRunner().invoke(app, ["roundtrip", str(copy), "--out", str(out)])
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_output_folder_replaced_when_asked(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(copy, out)
    (out / "thesis.tex").write_text("old")
    command = ["roundtrip", str(copy), "--out", str(out), "--overwrite", "--tokens", "8"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "thesis.tex" in result.output
    assert (out / "thesis.tex").read_text() == "old"
    (out / "thesis.tex").unlink()
    stale = next(out.glob("model-*.safetensors")).rename(out / "model-00001-of-00099.safetensors")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert not stale.exists()
    with MiniMaxM2Bridge.from_hf_pretrained(out):
        pass
