"""Export without a model: FP8 back to the byte, fresh scales, bf16, and of a changed weight only the changed blocks.

What a checkpoint holds is read by safetensors' own reader; what it should hold is `reference.fp8`'s.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import SCALE, W2, Q, all_tensors, edit_tensors
from support.conversions import assert_same_tensors, bits, dequantised, export, imported_from
from support.folders import contents
from torch import Tensor

from bridge.jobs.durable import footprint
from reference.fp8 import FP8, quantize_blockwise, requantize_blockwise

W1 = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_untouched_weights_come_back_to_the_byte(
    imported: Path, checkpoint: Path, source: dict, tmp_path: Path, dtype: str
) -> None:
    megatron = imported if dtype == "bf16" else imported_from(checkpoint, tmp_path / "megatron", dtype="fp32")
    summary = export(megatron, tmp_path / "out", source=str(checkpoint))
    assert_same_tensors(all_tensors(tmp_path / "out"), source)
    assert sum("model.layers.2." in name for name in source) == 2, "the multi-token-prediction layer is among them"
    others = [{k: v for k, v in contents(f).items() if "safetensors" not in k} for f in (tmp_path / "out", checkpoint)]
    assert others[0] == others[1]
    quantised = sum(name.endswith(SCALE) for name in source)
    assert (summary.identical, summary.requantised, summary.worst, summary.worst_error) == (quantised, 0, "", 0.0)
    assert summary.tensors == len(source)
    assert (summary.bytes_written, summary.files) == footprint(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.numel() * value.itemsize for value in source.values())


def test_fresh_scales_are_the_references(imported: Path, source: dict, tmp_path: Path) -> None:
    """Without a source: config and tokenizer are those that lie beside the Megatron checkpoint."""
    summary = export(imported, tmp_path / "out", scales="fresh")
    wanted = {}
    for name, value in dequantised(source).items():
        if "model.layers.2." in name:
            continue  # multi-token prediction: not in a Megatron checkpoint
        if source[name].dtype == FP8:
            wanted[name], wanted[name + SCALE] = quantize_blockwise(value)
        else:
            wanted[name] = value
    found = all_tensors(tmp_path / "out")
    assert_same_tensors(found, wanted)
    carried = {name: data for name, data in contents(tmp_path / "out").items() if "safetensors" not in name}
    assert carried == contents(imported / "hugging_face")
    changed = [name for name in wanted if name.endswith(SCALE) and not torch.equal(wanted[name], source[name])]
    assert changed, "fresh scales differ from the source's, or this shows nothing"
    assert (summary.identical, summary.requantised) == (0, sum(name.endswith(SCALE) for name in wanted))


def test_without_quantisation_the_weights_are_the_dequantised_ones(plain: Path, checkpoint: Path, source: dict) -> None:
    assert_same_tensors(all_tensors(plain), dequantised(source))
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    assert list(json.loads((plain / "config.json").read_text()).items()) == list(config.items())


def test_transformers_loads_it(plain: Path, source: dict) -> None:
    from support.oracles import to_disk_names
    from transformers import MiniMaxM2ForCausalLM

    model = MiniMaxM2ForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    found = to_disk_names(dict(model.state_dict()))
    wanted = {name: value for name, value in dequantised(source).items() if "model.layers.2." not in name}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def test_a_source_that_is_not_quantised(plain: Path, imported: Path, source: dict, tmp_path: Path) -> None:
    """bf16 in gives the Megatron checkpoint that FP8 gives; FP8 out, from a config that says nothing of it."""
    megatron = imported_from(plain, tmp_path / "megatron")
    assert contents(megatron / "iter_0000001") == contents(imported / "iter_0000001")
    export(megatron, tmp_path / "plain", quantization="none", source=str(plain))
    assert contents(tmp_path / "plain") == contents(plain)
    export(megatron, tmp_path / "fp8", scales="fresh", source=str(plain))
    found = all_tensors(tmp_path / "fp8")
    assert found.keys() == source.keys()
    codes, scale_inv = quantize_blockwise(dequantised(source)[Q])
    assert torch.equal(bits(found[Q]), bits(codes))
    assert torch.equal(found[Q + SCALE], scale_inv)
    section = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["weight_block_size"]) == ("fp8", [128, 128])


def one_block(weight: Tensor) -> None:
    weight[130, 5] = 0.5


def every_block(weight: Tensor) -> None:
    weight *= 1.37


def last_column(weight: Tensor) -> None:
    weight[:, -1] += 0.25


CHANGED: dict[str, Callable[[Tensor], None]] = {Q: one_block, W1: every_block, W2: last_column}


def test_of_a_changed_weight_only_the_changed_blocks_change(
    plain: Path, checkpoint: Path, source: dict, tmp_path: Path
) -> None:
    trained = Path(shutil.copytree(plain, tmp_path / "trained"))
    edit_tensors(trained, lambda tensors: [change(tensors[name]) for name, change in CHANGED.items()])
    megatron = imported_from(trained, tmp_path / "megatron")
    summary = export(megatron, tmp_path / "out", source=str(checkpoint))
    found, weights = all_tensors(tmp_path / "out"), all_tensors(trained)
    wanted, worst = dict(source), {}
    for name in CHANGED:
        wanted[name], wanted[name + SCALE] = requantize_blockwise(weights[name], source[name + SCALE])
        weight = weights[name].double()
        error = found[name].double() * spread(found[name + SCALE].double(), weight.shape)
        worst[name] = ((error.bfloat16().double() - weight).square().sum() / weight.square().sum()).sqrt().item()
    assert_same_tensors(found, wanted)
    touched = {name: (found[name + SCALE] != source[name + SCALE]).tolist() for name in CHANGED}
    assert touched[Q] == [[False, False], [True, False], [False, False]]
    assert touched[W1] == [[True, True]]
    assert touched[W2] == [[True], [True]]
    quantised = sum(name.endswith(SCALE) for name in source)
    assert (summary.identical, summary.requantised) == (quantised - 3, 3)
    assert summary.worst == max(worst, key=worst.get)
    assert math.isclose(summary.worst_error, max(worst.values()), rel_tol=1e-4)
    assert 0.01 < summary.worst_error < 0.04, "three bits of mantissa: 2^-4 at most, about 2^-5.3 on average"


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    return scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
