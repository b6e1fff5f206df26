"""What people have in place of a checkpoint that is read here: each is named, by every command that meets it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import edit_config
from typer.testing import CliRunner

from bridge.cli import app
from bridge.formats import OTHER_MODELS

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1897452536\n"


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "1000"})
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def refused_by_all(folder: Path, other: Path, said: str, *, plan: bool) -> None:
    """By every command that takes a Hugging Face checkpoint, with status 2; `plan` says whether it is too."""
    out = folder.parent / "out"
    for words in (["inspect", folder], ["import", folder, out], ["verify", other, folder], ["verify", folder, other]):
        status, found = run(*words)
        assert status == 2, (words, found)
        assert said in found, words
        assert "bug" not in found
        assert not out.exists()
    status, found = run("plan", folder, "--gpus", 8, "--memory", "2000GB")
    assert status == (2 if plan else 0), found
    assert (said in found) == plan


# ---------------------------------------------------------------------------------------------------------------- files

STAND_INS = {
    "git-lfs": (POINTER, "is a git-lfs pointer"),
    "web page": (b"\n<!DOCTYPE html><html><title>401</title></html>", "is a web page"),
    "web page, upper case": (b"<HTML><BODY>Sign in</BODY></HTML>", "is a web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    "hub's message": (b"Entry not found", "is the hub's error message"),
    "hub's other message": (b"Invalid username or password.", "is the hub's error message"),
    "gated": (b"Access to model MiniMaxAI/MiniMax-M2 is restricted", "is the hub's error message"),
    "empty": (b"", "is empty"),
    "zeros": (b"\0" * 4096, "begins with zeros"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"x" * 64, "is llama.cpp's GGUF"),
    "torch": (b"PK\x03\x04" + b"x" * 64, "is a file of torch.save"),
}


@pytest.mark.parametrize("name", ["shard", "config.json", "model.safetensors.index.json", "model.safetensors"])
@pytest.mark.parametrize("stand_in", STAND_INS)
def test_what_stands_in_for_a_file(copy: Path, name: str, stand_in: str) -> None:
    data, said = STAND_INS[stand_in]
    if name == "model.safetensors":
        (copy / "model.safetensors.index.json").unlink()
    path = min(copy.glob("*.safetensors")) if name == "shard" else copy / name
    path.write_bytes(data)
    for words in (["inspect", copy], ["import", copy, copy.parent / "out"]):
        status, found = run(*words)
        assert status == 2
        assert f"{path}: {said}" in found
    if name == "config.json":
        assert f"{path}: {said}" in run("plan", copy, "--gpus", 8)[1]


PARTIAL = ("{}.incomplete", "{}.part", "{}.crdownload", "{}.lock", "{}.aria2", "{}.4d7a12.incomplete",
           ".cache/huggingface/download/{}.Xy_z=.4d7a.incomplete")  # fmt: skip


@pytest.mark.parametrize("name", ["shard", "config.json"])
@pytest.mark.parametrize("form", PARTIAL)
def test_downloads_that_were_not_finished(copy: Path, name: str, form: str) -> None:
    path = min(copy.glob("*.safetensors")) if name == "shard" else copy / name
    partial = copy / form.format(path.name)
    partial.parent.mkdir(parents=True, exist_ok=True)
    path.rename(partial)
    status, found = run("inspect", copy)
    assert status == 2
    assert f"not there, but {partial} is: its download was not finished" in found


def test_a_file_with_room_that_is_not_filled_yet(copy: Path) -> None:
    """aria2 gives a file its size first, so its header may be whole."""
    shard = min(copy.glob("*.safetensors"))
    shard.with_name(f"{shard.name}.aria2").touch()
    status, found = run("inspect", copy)
    assert status == 2
    assert "its download was not finished" in found


def test_locks_of_whole_files_say_nothing(copy: Path) -> None:
    cache = copy / ".cache/huggingface/download"
    cache.mkdir(parents=True)
    for path in list(copy.glob("*.safetensors")):
        (cache / f"{path.name}.lock").touch()
        (cache / f"{path.name}.metadata").touch()
    assert run("inspect", copy)[0] == 0


# ------------------------------------------------------------------------------------------------- Hugging Face folders

HF_FOLDERS = {
    "bin": (["pytorch_model-00001-of-00002.bin"], "pytorch_model*.bin"),
    "bin index": (["pytorch_model.bin.index.json"], "pytorch_model*.bin"),
    "gguf": (["MiniMax-M2-Q4_K_M-00001-of-00003.gguf"], "llama.cpp's GGUF"),
    "gguf below": (["Q4_K_M/MiniMax-M2.gguf"], "llama.cpp's GGUF"),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter"),
    "pth": (["consolidated.00.pth"], "files of torch.save"),
    "checkpoint": (["last.ckpt"], "files of torch.save"),
    "deepspeed": (["global_step100/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed"),
    "deepspeed script": (["zero_to_fp32.py"], "DeepSpeed"),
    "fsdp": (["pytorch_model_fsdp_0/.metadata"], "accelerate's sharded FSDP"),
    "npz": (["weights.00.npz"], "is MLX's"),
    "tensorflow": (["tf_model.h5"], "TensorFlow"),
    "flax": (["flax_model.msgpack"], "Flax"),
    "onnx": (["model.onnx"], "ONNX"),
    "parent": (["MiniMax-M2/config.json", "MiniMax-M2.1/config.json"], "folders with a config.json"),
}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("kind", HF_FOLDERS)
def test_folders_without_safetensors(copy: Path, checkpoint: Path, kind: str, with_config: bool) -> None:
    names, said = HF_FOLDERS[kind]
    for path in copy.iterdir():
        if with_config and path.name == "config.json":
            continue
        path.unlink()
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"x" * 8)
    commands = [["inspect", copy], ["import", copy, copy.parent / "out"]]
    if not with_config:
        commands.append(["plan", copy, "--gpus", 8])
    for words in commands:
        status, found = run(*words)
        assert status == 2
        assert f"{copy}: " in found
        assert said in found


def test_the_other_format(copy: Path, imported: Path) -> None:
    for words in (["inspect", imported], ["plan", imported, "--gpus", 8]):
        status, found = run(*words)
        assert status == 2
        assert "is a distributed checkpoint, expected a Hugging Face one; `export` makes" in found
    status, found = run("export", copy, copy.parent / "out")
    assert status == 2
    assert "is a Hugging Face checkpoint, expected a distributed one (torch_dist); `import` makes" in found


# ---------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("kind", [*OTHER_MODELS, "qwen3_moe", "llama", "deepseek_v3"])
def test_other_models(copy: Path, checkpoint: Path, kind: str) -> None:
    edit_config(copy, lambda config: config.update(model_type=kind))
    refused_by_all(copy, checkpoint, f"model_type is '{kind}'", plan=True)
    said = run("inspect", copy)[1]
    assert "another architecture than 'minimax_m2'" in said
    assert OTHER_MODELS.get(kind, "") in said


QUANTISED = {
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "by AWQ"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": True}}, "by GPTQ"),
    "GPTQ Marlin": ({"quantization_config": {"quant_method": "gptq_marlin"}}, "by GPTQ"),
    "AutoRound": ({"quantization_config": {"quant_method": "auto-round"}}, "by AutoRound"),
    "NVFP4": ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "ModelOpt (NVFP4"),
    "ModelOpt's own": ({"quantization_config": {"producer": {"name": "modelopt"}, "quant_algo": "FP8"}}, "ModelOpt"),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "compressed-tensors",
    ),
    "compression_config": ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    "MLX": ({"quantization": {"bits": 4, "group_size": 64}}, "by MLX"),
    "MLX twice": (
        {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4, "group_size": 64}},
        "by MLX",
    ),
    "GGUF": ({"quantization_config": {"quant_method": "gguf"}}, "is GGUF"),
    "MXFP4": ({"quantization_config": {"quant_method": "mxfp4"}}, "microscaling"),
    "unknown": ({"quantization_config": {"quant_method": "spqr"}}, "'spqr', which is not read here"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_other_quantisations(copy: Path, checkpoint: Path, kind: str) -> None:
    """`plan` needs sizes only, so it works for all of them."""
    changes, said = QUANTISED[kind]

    def change(config: dict) -> None:
        config.pop("quantization_config")
        config.update(changes)

    edit_config(copy, change)
    refused_by_all(copy, checkpoint, said, plan=False)


# ---------------------------------------------------------------------------------------------- distributed checkpoints

LEGACY = ("mp_rank_00/model_optim_rng.pt", "iter_0000010/mp_rank_00/model_optim_rng.pt",
          "iter_0000010/mp_rank_03_001/model_rng.pt", "release/mp_rank_00/model_optim_rng.pt")  # fmt: skip


def refused_export(folder: Path, checkpoint: Path, said: str) -> None:
    out = folder.parent / "out"
    for words in (["export", folder, out, "--source", checkpoint], ["verify", checkpoint, folder],
                  ["export", folder, out, "--source", checkpoint, "--dry-run"]):  # fmt: skip
        status, found = run(*words)
        assert status == 2, found
        assert said in found
        assert "Megatron-LM" in found or "save it again" in found, "what to do"
        assert not out.exists()


@pytest.mark.parametrize("tracker", [True, False])
@pytest.mark.parametrize("name", LEGACY)
def test_legacy_torch(tmp_path: Path, checkpoint: Path, name: str, tracker: bool) -> None:
    folder = tmp_path / "megatron"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"x")
    if tracker and "/mp_rank" in name:
        step = "release" if name.startswith("release") else "10"
        (folder / "latest_checkpointed_iteration.txt").write_text(step)
    refused_export(folder, checkpoint, "is a legacy torch checkpoint of Megatron-LM")


@pytest.mark.parametrize("known_by", ["metadata.json", "arrays"])
def test_zarr(tmp_path: Path, checkpoint: Path, known_by: str) -> None:
    folder = tmp_path / "megatron"
    step = folder / "iter_0000010"
    (step / "decoder.final_layernorm.weight").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    if known_by == "arrays":
        (step / "decoder.final_layernorm.weight/.zarray").write_text("{}")
    else:
        (step / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    refused_export(folder, checkpoint, "is a zarr checkpoint")


SAVES: dict[str, tuple[str | None, str, str]] = {
    "plain DCP": (None, "model.decoder.layers.0.weight", "it is torch's own distributed checkpoint"),
    "fsdp_dtensor": (None, "model.module.decoder.layers.0.mlp.linear_fc1.weight_w", "Megatron-FSDP (fsdp_dtensor)"),
    "fsdp_dtensor, named": ("fsdp_dtensor", "model.module.x", "Megatron-FSDP (fsdp_dtensor)"),
    "singleton_local_shards": (
        "torch_dist",
        "decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight_w",
        "was saved with singleton_local_shards",
    ),
    "another": ("nvrx_dist", "decoder.final_layernorm.weight", "names the format 'nvrx_dist', expected 'torch_dist'"),
}


@pytest.mark.parametrize("kind", SAVES)
def test_other_saves(tmp_path: Path, checkpoint: Path, kind: str) -> None:
    backend, key, said = SAVES[kind]
    folder = tmp_path / "megatron"
    dcp.save({key: torch.zeros(4)}, checkpoint_id=folder, no_dist=True)
    if backend:
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
    refused_export(folder, checkpoint, said)


@pytest.mark.parametrize("break_it", ["gone", "not JSON", "a list"])
def test_a_save_without_its_metadata_json(imported: Path, checkpoint: Path, tmp_path: Path, break_it: str) -> None:
    """Megatron-LM writes it last, and takes the folder for no torch_dist without it either."""
    folder = Path(shutil.copytree(imported, tmp_path / "megatron"))
    path = folder / "iter_0000001/metadata.json"
    actions: dict[str, Callable[[], object]] = {
        "gone": path.unlink,
        "not JSON": lambda: path.write_text("{"),
        "a list": lambda: path.write_text("[]"),
    }
    actions[break_it]()
    refused_export(folder, checkpoint, "has no metadata.json")
