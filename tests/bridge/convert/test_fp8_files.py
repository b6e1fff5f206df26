"""Files as other tools write them, through import and export: scales of other dtypes or of 0, scale_fmt, float32."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from support.checkpoints import EDGY_CONFIG, SCALE, W2, Q, all_tensors, edit_config, edit_tensors
from support.conversions import assert_same_tensors, bits, dequantised, export, imported_from
from support.fp8_files import KINDS, as_other_tools, claim, powers_of_two, quantized, scales_of, written
from torch import Tensor

from bridge.huggingface.random_checkpoint import make_checkpoint
from bridge.proof.compare import compare_checkpoints
from bridge.torch_dist.checkpoint import MegatronCheckpoint
from bridge.torch_dist.writer import Chunk, finish, write_chunks, write_states
from reference.fp8 import dequantize_blockwise, quantize_blockwise, requantize_blockwise

W1 = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def changed(plain: Path, out: Path, change) -> Path:
    """A Megatron checkpoint of these weights in bfloat16, some of them changed."""
    trained = Path(shutil.copytree(plain, out / "trained"))
    edit_tensors(trained, change)
    return imported_from(trained, out / "trained megatron")


# --------------------------------------------------------------------------------------- scales of other dtypes, zeros


FLOAT32_KINDS = ("bfloat16 and float16", "zeros in float16")


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "bf16") for kind in KINDS), *((kind, "fp32") for kind in FLOAT32_KINDS)]
)
def test_values_are_the_references_and_come_back(kind: str, dtype: str, copy: Path, tmp_path: Path) -> None:
    as_other_tools(copy, kind)
    source = all_tensors(copy)
    megatron = imported_from(copy, tmp_path / "megatron", dtype=dtype)
    values = dequantised(written(source), {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    held = MegatronCheckpoint(megatron)
    for name in quantized(source):
        assert torch.equal(bits(held.read_weight(name)), bits(values[name])), name

    summary = export(megatron, tmp_path / "out", source=str(copy))
    assert_same_tensors(all_tensors(tmp_path / "out"), written(source))
    assert (summary.identical, summary.requantised) == (len(quantized(source)), 0)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written(source).values())
    assert (tmp_path / "out/config.json").read_bytes() == (copy / "config.json").read_bytes()

    found = compare_checkpoints(copy, tmp_path / "out")
    assert found.differences == []
    assert found.same_values == sum(scales.dtype != torch.float32 for scales in scales_of(source))
    assert found.same_bytes == found.tensors - found.same_values


@pytest.mark.parametrize(("code", "row"), [(0x01, 0), (0x81, 130), (0x7F, 287)])
def test_one_code_under_a_scale_of_zero_is_an_error(code: int, row: int, copy: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        KINDS["zeros everywhere"](tensors)
        tensors[Q].view(torch.uint8)[row, 159] = code

    edit_tensors(copy, spoil)
    with pytest.raises(ValueError, match=rf"{Q}_scale_inv: scale of block \[{row // 128}, 1\] is 0.0"):
        imported_from(copy, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize("kind", ["zeros everywhere", "zeros in float16", "bfloat16"])
def test_a_changed_block_gets_a_fresh_scale(kind: str, copy: Path, tmp_path: Path) -> None:
    as_other_tools(copy, kind)
    source = written(all_tensors(copy))
    export(imported_from(copy, tmp_path / "megatron"), tmp_path / "plain", quantization="none", source=str(copy))

    def train(tensors: dict[str, Tensor]) -> None:
        tensors[Q][200, 3] = 0.75

    summary = export(changed(tmp_path / "plain", tmp_path, train), tmp_path / "out", source=str(copy))
    weight = dequantised(source)[Q]
    weight[200, 3] = 0.75
    wanted = dict(source)
    wanted[Q], wanted[Q + SCALE] = requantize_blockwise(weight, source[Q + SCALE])
    assert_same_tensors(all_tensors(tmp_path / "out"), wanted)
    assert (wanted[Q + SCALE] != source[Q + SCALE]).nonzero().tolist() == [[1, 0]]
    assert wanted[Q + SCALE][1, 0] == weight[128:256, :128].float().abs().max() / 448
    assert (summary.identical, summary.requantised) == (len(quantized(source)) - 1, 1)


@pytest.mark.parametrize("other", [0.5, 0.5000001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
def test_verify_compares_scales_of_different_dtypes_by_value(
    dtype: torch.dtype, other: float, checkpoint: Path, copy: Path, tmp_path: Path
) -> None:
    narrow = Path(shutil.copytree(copy, tmp_path / "narrow"))
    edit_tensors(narrow, lambda tensors: tensors.update({Q + SCALE: torch.full((3, 2), 0.5).to(dtype)}))
    edit_tensors(copy, lambda tensors: tensors.update({Q + SCALE: torch.full((3, 2), other)}))
    for pair in ((copy, narrow), (narrow, copy)):
        found = compare_checkpoints(*pair)
        assert [difference.name for difference in found.differences] == ([] if other == 0.5 else [Q])
        assert found.same_values == int(other == 0.5)


# ------------------------------------------------------------------------------------------------- float32 torch_dist


def widened(megatron: Path, out: Path) -> Path:
    """The same values, every tensor in float32."""
    held = MegatronCheckpoint(megatron)
    parts = []
    for entry in held.entries:
        shape = (*(1 for _ in entry.index), *entry.parameter.shape)
        start = (*entry.index, *(0 for _ in entry.parameter.shape))
        chunk = Chunk(entry.key, start, shape, entry.shape, torch.float32)
        parts.append((chunk, partial(lambda entry: held.read_rows(entry, 0, entry.parameter.shape[0]).float(), entry)))
    out.mkdir()
    stored = write_chunks(out, 0, parts) + write_states(out, 1, held.config, {})
    finish(out, [chunk for chunk, _ in parts], stored)
    shutil.copytree(megatron / "hugging_face", out / "hugging_face")
    return out


@pytest.mark.parametrize("kind", ["as released", "float16", "zeros in the first blocks"])
def test_a_float32_checkpoint_of_bfloat16_values_is_untouched(kind: str, copy: Path, tmp_path: Path) -> None:
    if kind in KINDS:
        as_other_tools(copy, kind)
    source = all_tensors(copy)
    megatron = widened(imported_from(copy, tmp_path / "bf16"), tmp_path / "fp32")
    assert {MegatronCheckpoint(megatron).dtype(name) for name in quantized(source)} == {torch.float32}
    exact = dequantised(written(source), torch.float32)[Q]
    assert (MegatronCheckpoint(megatron).read_weight(Q) != exact).any(), "rounded, or this shows nothing"
    summary = export(megatron, tmp_path / "out", source=str(copy))
    assert_same_tensors(all_tensors(tmp_path / "out"), written(source))
    assert (summary.identical, summary.requantised, summary.worst_error) == (len(quantized(source)), 0, 0.0)


def test_of_a_float32_checkpoint_only_the_changed_blocks_change(
    plain: Path, checkpoint: Path, source: dict, tmp_path: Path
) -> None:
    def train(tensors: dict[str, Tensor]) -> None:
        tensors[Q][130, 5] = 0.5
        tensors[W1] *= 1.37

    megatron = widened(changed(plain, tmp_path, train), tmp_path / "fp32")
    summary = export(megatron, tmp_path / "out", source=str(checkpoint))
    found = all_tensors(tmp_path / "out")
    others = {name for name in found if not torch.equal(bits(found[name]), bits(source[name]))}
    assert others - {W1} == {Q, Q + SCALE, W1 + SCALE}  # all of a block times one number can have the same codes
    assert (found[Q + SCALE] != source[Q + SCALE]).nonzero().tolist() == [[1, 0]]
    assert (found[W1 + SCALE] != source[W1 + SCALE]).all()
    assert summary.requantised == 2


# ------------------------------------------------------------------------------------------------------- powers of two


@pytest.fixture(scope="module")
def of_powers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose scales are powers of two, as its config.json says. Do not write to it."""
    section = EDGY_CONFIG["quantization_config"] | {"scale_fmt": "ue8m0", "fmt": "e4m3"}
    folder = tmp_path_factory.mktemp("powers") / "hf"
    make_checkpoint(folder, EDGY_CONFIG | {"quantization_config": section}, mtp_layers=1, max_shard_bytes=150_000)
    assert all(powers_of_two(scales_of(all_tensors(folder))))
    return folder


@pytest.fixture(scope="module")
def of_powers_in_bf16(of_powers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported_from(of_powers, tmp_path_factory.mktemp("powers") / "megatron")


def every_third(tensors: dict[str, Tensor]) -> None:
    for name in sorted(tensors)[::3]:
        tensors[name] *= 1.37


@pytest.mark.parametrize("scales", ["source", "fresh"])
def test_untouched_powers_of_two(scales: str, of_powers: Path, of_powers_in_bf16: Path, tmp_path: Path) -> None:
    export(of_powers_in_bf16, tmp_path / "out", scales=scales, source=str(of_powers))
    found, source = all_tensors(tmp_path / "out"), all_tensors(of_powers)
    assert all(powers_of_two(scales_of(found)))
    assert (tmp_path / "out/config.json").read_bytes() == (of_powers / "config.json").read_bytes()
    if scales == "source":
        assert_same_tensors(found, source)
    else:
        value = dequantised(source)[W2]
        assert torch.equal(found[W2 + SCALE], quantize_blockwise(value, scale_fmt="ue8m0")[1])


@pytest.mark.parametrize("scales", ["source", "fresh"])
def test_changed_weights_get_powers_of_two(
    scales: str, of_powers: Path, of_powers_in_bf16: Path, tmp_path: Path
) -> None:
    export(of_powers_in_bf16, tmp_path / "plain", quantization="none", source=str(of_powers))
    megatron = changed(tmp_path / "plain", tmp_path, every_third)
    weights = all_tensors(tmp_path / "trained")
    summary = export(megatron, tmp_path / "out", scales=scales, source=str(of_powers))
    found, source = all_tensors(tmp_path / "out"), all_tensors(of_powers)
    assert summary.requantised
    assert all(powers_of_two(scales_of(found)))
    for name in quantized(found):
        if scales == "source":
            wanted = requantize_blockwise(weights[name], source[name + SCALE], scale_fmt="ue8m0")
        else:
            wanted = quantize_blockwise(weights[name], scale_fmt="ue8m0")
        assert all(
            torch.equal(bits(a), bits(b)) for a, b in zip((found[name], found[name + SCALE]), wanted, strict=True)
        )
        error = dequantize_blockwise(found[name], found[name + SCALE]).double() - weights[name].double()
        assert error.norm() < 2.0**-4 * weights[name].double().norm()


def test_without_a_source_the_config_beside_decides(of_powers_in_bf16: Path, tmp_path: Path) -> None:
    export(of_powers_in_bf16, tmp_path / "out", scales="fresh")
    assert all(powers_of_two(scales_of(all_tensors(tmp_path / "out"))))
    assert config_of(tmp_path / "out")["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("lie", ["every scale", "one scale", "one scale of zero, one lie"])
def test_a_source_whose_scales_are_not_what_it_says(
    lie: str, of_powers: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kept scales make the key go, and it is said; fresh ones make it true."""

    def one(tensors: dict[str, Tensor]) -> None:
        tensors[W2 + SCALE][0, 0] *= 1.25
        if "zero" in lie:
            tensors[Q].view(torch.uint8)[:128, :128] = 0
            tensors[Q + SCALE][0, 0] = 0.0

    folder = Path(shutil.copytree(checkpoint if lie == "every scale" else of_powers, tmp_path / "source"))
    claim(folder, "ue8m0")
    if lie != "every scale":
        edit_tensors(folder, one)
    megatron = imported_from(folder, tmp_path / "megatron")
    with caplog.at_level(logging.WARNING, "bridge"):
        export(megatron, tmp_path / "kept", source=str(folder))
    assert "is no power of two" in caplog.text
    assert lie == "every scale" or W2 + SCALE in caplog.text
    assert_same_tensors(all_tensors(tmp_path / "kept"), all_tensors(folder))
    wanted = config_of(folder)
    del wanted["quantization_config"]["scale_fmt"]
    assert list(config_of(tmp_path / "kept").items()) == list(wanted.items())

    caplog.clear()
    export(megatron, tmp_path / "fresh", scales="fresh", source=str(folder))
    assert not [record for record in caplog.records if record.name.startswith("bridge")]
    assert (tmp_path / "fresh/config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert all(powers_of_two(scales_of(all_tensors(tmp_path / "fresh"))))


@pytest.mark.parametrize("scale_fmt", ["float", None])
def test_a_source_that_claims_nothing_keeps_its_key(scale_fmt: str | None, copy: Path, tmp_path: Path) -> None:
    claim(copy, scale_fmt)
    export(imported_from(copy, tmp_path / "megatron"), tmp_path / "out", source=str(copy))
    assert (tmp_path / "out/config.json").read_bytes() == (copy / "config.json").read_bytes()
    assert not all(powers_of_two(scales_of(all_tensors(tmp_path / "out"))))


@pytest.mark.parametrize(
    "keys", [{}, {"dtype": "float8_e4m3fn"}, {"torch_dtype": "torch.float8_e4m3fn"}, {"dtype": "fp8"}]
)
@pytest.mark.parametrize("section", [{}, {"scale_fmt": "ue8m0"}, {"fmt": "e4m3"}])
def test_without_quantisation_no_key_says_float8(section: dict, keys: dict, of_powers: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(of_powers, tmp_path / "source"))
    edit_config(folder, lambda config: config.update(keys))
    edit_config(folder, lambda config: config["quantization_config"].update(section))
    megatron = imported_from(folder, tmp_path / "megatron")
    export(megatron, tmp_path / "plain", quantization="none", source=str(folder))
    text = (tmp_path / "plain/config.json").read_text().lower()
    assert not [word for word in ("fp8", "float8", "e4m3", "e8m0", "quantization") if word in text]
    wanted = {key: value for key, value in config_of(folder).items() if key != "quantization_config"}
    assert config_of(tmp_path / "plain") == wanted | dict.fromkeys(keys, "bfloat16")
    assert not quantized(all_tensors(tmp_path / "plain"))
    assert compare_checkpoints(folder, tmp_path / "plain").differences == []
