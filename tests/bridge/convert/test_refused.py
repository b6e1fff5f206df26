"""What import and export without a model refuse: damaged sources, Megatron checkpoints of another model, options that
make no sense, folders in use. The error names it, and nothing is written.
"""

import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import SCALE, W2, Q, edit_config, edit_tensors
from support.conversions import SHARD_BYTES, export, imported_from
from support.folders import contents
from torch import Tensor

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint

K = "model.layers.1.self_attn.k_proj.weight"


def setting(name: str, change: Callable[[Tensor], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: change(tensors[name]))


def nan_code(weight: Tensor) -> None:
    weight.view(torch.uint8)[3, 5] = 0xFF


# Of each kind of check one: on reading, of scales and codes, and on opening. All are in `test_bad_input`.
DAMAGED_SOURCES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "NaN scale": (setting(Q + SCALE, lambda s: s[2, 1].fill_(math.nan)), [Q + SCALE, "nan"]),
    "NaN code": (setting(Q, nan_code), [f"{Q}: float8 code at", "NaN"]),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(W2)), [f"{W2}: missing"]),
}


@pytest.mark.parametrize("damage", DAMAGED_SOURCES)
def test_a_damaged_source_is_not_imported(copy: Path, tmp_path: Path, damage: str) -> None:
    spoil, mentions = DAMAGED_SOURCES[damage]
    spoil(copy)
    with pytest.raises(ValueError, match=re.escape(mentions[0])) as caught:
        imported_from(copy, tmp_path / "out")
    for mention in mentions:
        assert mention in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["NaN scale", "NaN code"])
def test_a_damaged_source_lends_no_scales(imported: Path, copy: Path, tmp_path: Path, damage: str) -> None:
    spoil, mentions = DAMAGED_SOURCES[damage]
    spoil(copy)
    with pytest.raises(ValueError, match=re.escape(mentions[0])) as caught:
        export(imported, tmp_path / "out", source=str(copy))
    for mention in mentions:
        assert mention in str(caught.value)
    assert not (tmp_path / "out").exists()


def edit_metadata(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "iter_0000001/.metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata.state_dict_metadata)
    path.write_bytes(pickle.dumps(metadata))


def edit_beside(folder: Path, change: Callable[[dict], object]) -> None:
    edit_config(folder / "hugging_face", change)


QKV = "decoder.layers.self_attention.linear_qkv.weight"
FRESH = {"scales": "fresh"}
REFUSED_EXPORTS: dict[str, tuple[Callable[[Path], object], dict, list[str]]] = {
    "missing key": (lambda f: edit_metadata(f, lambda m: m.pop(QKV)), FRESH, [f"{QKV}: missing from"]),
    "fewer experts": (
        lambda f: edit_beside(f, lambda c: c.update(num_local_experts=4)),
        FRESH,
        ["decoder.layers.mlp.router.weight: found shape [2, 5, 160]", "expected [2, 4, 160]"],
    ),
    "more layers": (lambda f: edit_beside(f, lambda c: c.update(num_hidden_layers=3)), FRESH, ["[2, 160]", "[3, 160]"]),
    "more tokens": (lambda f: edit_beside(f, lambda c: c.update(vocab_size=132)), FRESH, ["[131, 160]", "[132, 160]"]),
    "no config": (lambda f: shutil.rmtree(f / "hugging_face"), FRESH, ["no hugging_face/config.json", "as source"]),
    "config is not JSON": (
        lambda f: (f / "hugging_face/config.json").write_text("{"),
        FRESH,
        ["hugging_face/config.json: not JSON"],
    ),
    "no source for its scales": (lambda f: None, {"scales": "source"}, ["scales 'source' needs", "give source"]),
    "unknown quantisation": (
        lambda f: None,
        {"quantization": "int4"},
        ["quantization must be 'fp8' or 'none'", "int4"],
    ),
    "unknown scales": (lambda f: None, {"scales": "stale"}, ["scales", "stale"]),
}


@pytest.mark.parametrize("case", REFUSED_EXPORTS)
def test_what_is_not_exported(imported: Path, tmp_path: Path, case: str) -> None:
    spoil, options, mentions = REFUSED_EXPORTS[case]
    megatron = Path(shutil.copytree(imported, tmp_path / "megatron"))
    spoil(megatron)
    with pytest.raises(ValueError, match=re.escape(mentions[0])) as caught:
        export(megatron, tmp_path / "out", **options)
    for mention in mentions:
        assert mention in str(caught.value)
    assert os.listdir(tmp_path) == ["megatron"]


def test_a_source_without_scales_lends_none(imported: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scales 'source' needs the FP8 checkpoint"):
        export(imported, tmp_path / "out", source=str(plain))
    assert os.listdir(tmp_path) == []


def test_a_weight_that_is_not_finite_is_named(plain: Path, checkpoint: Path, tmp_path: Path) -> None:
    trained = Path(shutil.copytree(plain, tmp_path / "trained"))
    edit_tensors(trained, lambda tensors: tensors[K][1, 2].fill_(math.inf))
    megatron = imported_from(trained, tmp_path / "megatron")
    with pytest.raises(ValueError, match=rf"{K}: value at \[1, 2\] is inf"):
        export(megatron, tmp_path / "out", source=str(checkpoint))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "fp16"}, "dtype must be one of"), ({"iteration": 0}, "iteration must be at least 1")],
)
def test_options_that_make_no_sense(checkpoint: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imported_from(checkpoint, tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_replaced_only_when_asked(imported: Path, checkpoint: Path, tmp_path: Path) -> None:
    job = ExportJob(str(imported), str(tmp_path / "out"), source=str(checkpoint), max_shard_bytes=SHARD_BYTES)
    (tmp_path / "out").mkdir()
    stale = "model-00007-of-00099.safetensors"
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "out" / stale).write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        export_checkpoint(job)
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which the new checkpoint has not"):
        export_checkpoint(job, overwrite=True)
    assert contents(tmp_path / "out") == {"config.json": b"{}", stale: b"x", "thesis.tex": b"x"}
    (tmp_path / "out/thesis.tex").unlink()
    export_checkpoint(job, overwrite=True)
    assert stale not in contents(tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        import_checkpoint(ImportJob(str(checkpoint), str(tmp_path / "out")), overwrite=True)
