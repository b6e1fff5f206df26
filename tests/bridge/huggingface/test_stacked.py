"""Checkpoints as transformers keeps weights in memory, experts stacked: read, converted, and written unstacked."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import EDGY_CONFIG, all_tensors, edit_config, edit_tensors
from support.conversions import assert_same_tensors, export, imported_from
from support.oracles import to_memory_names
from torch import Tensor
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM
from typer.testing import CliRunner

from bridge import MiniMaxM2Bridge
from bridge.cli import app
from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.random_checkpoint import make_checkpoint
from bridge.model.process_groups import model_parallel
from bridge.proof.compare import compare_checkpoints
from reference.checkpoint import problems
from reference.config import ModelConfig

SCALE = "_scale_inv"
# w1 and w3 end where a block ends, and w2's last block is smaller.
ALIGNED = EDGY_CONFIG | {"intermediate_size": 128, "hidden_size": 200}
MTP = "model.layers.2."


def stack(tensors: dict[str, Tensor]) -> None:
    """Give a checkpoint's tensors, scales too, their names in memory; by hand (`support.oracles`)."""
    own = {name: value for name, value in tensors.items() if not name.startswith(MTP)}
    scales = {name.removesuffix(SCALE): value for name, value in own.items() if name.endswith(SCALE)}
    weights = {name: value.view(torch.uint8) for name, value in own.items() if not name.endswith(SCALE)}
    stacked = to_memory_names(weights)
    stacked_scales = to_memory_names(scales)
    for name in list(own):
        del tensors[name]
    for name, value in stacked.items():
        is_float8 = name in stacked_scales
        tensors[name] = value.view(torch.float8_e4m3fn if is_float8 else dtype_of(name, own))
    tensors.update({name + SCALE: value for name, value in stacked_scales.items()})


def dtype_of(name: str, disk: dict[str, Tensor]) -> torch.dtype:
    if ".mlp.experts." in name:
        return next(value.dtype for disk_name, value in disk.items() if disk_name.endswith(".w1.weight"))
    return disk[name.replace(".mlp.", ".block_sparse_moe.")].dtype


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned") / "hf"
    make_checkpoint(folder, ALIGNED, mtp_layers=1, max_shard_bytes=150_000)
    return folder


@pytest.fixture(scope="module")
def aligned_plain(aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned_plain")
    export(imported_from(aligned, folder / "megatron"), folder / "hf", quantization="none", source=str(aligned))
    return folder / "hf"


def stacked_copy(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    edit_tensors(folder, stack)
    return folder


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_a_stacked_checkpoint_is_the_unstacked_one(kind: str, aligned: Path, aligned_plain: Path, tmp_path: Path):
    """Read tensor by tensor, verified, imported, and exported with the source's scales under the released names."""
    source = {"fp8": aligned, "bf16": aligned_plain}[kind]
    stacked = stacked_copy(source, tmp_path / "stacked")
    names = set(all_tensors(stacked))
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert not [name for name in names if "block_sparse_moe" in name]
    with HuggingFaceCheckpoint(stacked) as one, HuggingFaceCheckpoint(source) as other:
        assert set(one.files.tensors) == set(other.files.tensors)
        assert one.files.nbytes == other.files.nbytes
        for name in other.files.tensors:
            found, wanted = one.files.read(name), other.files.read(name)
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name
            if found.ndim == 2 and len(found) > 5:
                assert torch.equal(one.files.read(name, slice(2, 5)).view(torch.uint8), wanted[2:5].view(torch.uint8))
    assert compare_checkpoints(stacked, source).differences == []
    megatron = imported_from(stacked, tmp_path / "megatron")
    for file in (imported_from(source, tmp_path / "other") / "iter_0000001").glob("*.distcp"):
        assert (megatron / "iter_0000001" / file.name).read_bytes() == file.read_bytes()
    quantization = {"fp8": "fp8", "bf16": "none"}[kind]
    said = export(megatron, tmp_path / "out", quantization=quantization, source=str(stacked))
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(source))
    assert said.requantised == 0


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_a_live_model_takes_it_and_writes_it_unstacked(kind: str, aligned: Path, aligned_plain: Path, tmp_path: Path):
    source = {"fp8": aligned, "bf16": aligned_plain}[kind]
    stacked = stacked_copy(source, tmp_path / "stacked")
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(stacked) as bridge:
        model = bridge.to_megatron_model()
        bridge.save_hf_pretrained(model, tmp_path / "out", quantization="fp8" if kind == "fp8" else None)
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(source))


def test_what_transformers_has_in_memory(plain: Path, tmp_path: Path):
    """Its own state_dict, saved by safetensors directly; sizes here are no multiples of anything."""
    model = MiniMaxM2ForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    folder = tmp_path / "state"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    with HuggingFaceCheckpoint(folder) as checkpoint, HuggingFaceCheckpoint(plain) as released:
        assert checkpoint.mtp_tensors == []
        for name in released.files.tensors:
            if not name.startswith(MTP):
                wanted = released.files.read(name).bfloat16()
                assert torch.equal(checkpoint.files.read(name), wanted), name
    found = CliRunner().invoke(app, ["inspect", "--json", str(folder)])
    assert found.exit_code == 0, found.stdout
    said = json.loads(found.stdout)["facts"]["stacked"]
    assert said == "8 tensors as transformers has them in memory, read as 34 of the released names"
    assert MiniMaxM2Config.from_pretrained(folder).num_local_experts == EDGY_CONFIG["num_local_experts"]


GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
W1 = "model.layers.1.block_sparse_moe.experts.0.w1.weight"


def changing(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "transposed": (
        changing(GATE_UP, lambda w: w.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn)),
        f"{GATE_UP}: found shape [5, 200, 256], expected [5, 256, 200]",
    ),
    "an expert less": (changing(DOWN, lambda w: w[:-1]), f"{DOWN}: found shape [4, 200, 128], expected [5, 200, 128]"),
    "flat": (changing(DOWN, lambda w: w.flatten(0, 1)), f"{DOWN}: found shape [1000, 128], expected [5, 200, 128]"),
    "gate alone": (
        changing(GATE_UP, lambda w: w[:, :128]),
        f"{GATE_UP}: found shape [5, 128, 200], expected [5, ",
    ),
    "scales too few": (
        changing(GATE_UP + SCALE, lambda s: s[:, :1]),
        f"{GATE_UP}{SCALE}: found shape [5, 1, 2], expected [5, 2, 2]",
    ),
    "scales missing": (
        lambda t: t.pop(GATE_UP + SCALE),
        "model.layers.1.block_sparse_moe.experts.0.w1.weight_scale_inv: missing, expected the block scales of ",
    ),
    "scales of a plain stack": (
        changing(DOWN, lambda w: w.to(torch.bfloat16)),
        "model.layers.1.block_sparse_moe.experts.0.w2.weight: found dtype bfloat16 and scales ",
    ),
    "both": (
        lambda t: t.update({W1: torch.zeros(128, 200)}),
        f"{W1}: is there, and in {GATE_UP} too; remove one of them",
    ),
    "router twice": (
        lambda t: t.update({"model.layers.0.block_sparse_moe.gate.weight": torch.zeros(5, 200)}),
        "model.layers.0.block_sparse_moe.gate.weight: is there, and in model.layers.0.mlp.gate.weight too",
    ),
    "a stack missing": (lambda t: t.pop(DOWN), "model.layers.1.block_sparse_moe.experts.0.w2.weight: missing from"),
}


@pytest.mark.parametrize(("spoil", "complaint"), WRONG.values(), ids=WRONG)
def test_stacks_that_are_not_consistent_are_refused(spoil, complaint: str, aligned: Path):
    tensors = all_tensors(aligned)
    stack(tensors)
    config = ModelConfig.from_hf(ALIGNED)
    assert problems({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}, config) == []
    spoil(tensors)
    said = problems({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}, config)
    assert any(line.startswith(complaint) for line in said), said
    assert len(said) <= 2, said


def test_scales_of_w1_and_w3_both_are_refused(checkpoint: Path, tmp_path: Path):
    """72 rows of each in blocks of 128: the first block has rows of both."""
    folder = tmp_path / "unaligned"
    folder.mkdir()
    rows = 2 * EDGY_CONFIG["intermediate_size"]
    tensors = all_tensors(checkpoint)
    stack(tensors)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        tensors[name + SCALE] = torch.ones(5, math.ceil(rows / 128), 2)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(EDGY_CONFIG))
    with pytest.raises(ValueError, match=re.escape("in which w1 ends at row 72, inside a block of 128")) as caught:
        HuggingFaceCheckpoint(folder)
    assert len(str(caught.value).splitlines()) == 1
    edit_config(folder, lambda c: c["quantization_config"].update(weight_block_size=[8, 8]))
    with pytest.raises(ValueError, match=re.escape("expected [5, 18, 20]")):
        HuggingFaceCheckpoint(folder)
