"""Files as other tools write them, through a running model: scales of other dtypes or of 0, scale_fmt, float32."""

import json
import logging
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support.checkpoints import EDGY_CONFIG, SCALE, W2, Q, all_tensors, edit_tensors
from support.conversions import assert_same_tensors, dequantised
from support.fp8_files import KINDS, as_other_tools, claim, powers_of_two, quantized, scales_of, written

from bridge import MiniMaxM2Bridge
from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.random_checkpoint import make_checkpoint
from bridge.model.process_groups import model_parallel
from bridge.weights import read_plan
from bridge.weights.load import load_weights
from bridge.weights.param_mapping import MappingRegistry
from bridge.weights.sharded_model import ShardedModel
from reference.fp8 import quantize_blockwise, requantize_blockwise
from reference.parallelism import Parallelism
from reference.sharding import shard
from reference.weights import Dialect

LAYOUTS = {
    "one rank": Parallelism(),
    "tp2": Parallelism(tp=2, etp=2),  # columns of w2 and o_proj from 36 and 144 on: inside blocks
    "etp4": Parallelism(tp=2, dp=2, etp=4),
}


def loaded(folder: Path, layout: Parallelism, rank: int) -> ShardedModel:
    """A rank's parameters in bfloat16, without a model."""
    with HuggingFaceCheckpoint(folder) as checkpoint:
        registry = MappingRegistry(checkpoint.config, Dialect.MEGATRON_LOCAL, layout, rank)
        parameters = [mapping.parameter for mapping in registry]
        state = {(p.chunk, p.name): torch.full(p.shape, 7.0, dtype=torch.bfloat16) for p in parameters}
        sharded = ShardedModel(registry, state, {})
        load_weights(sharded, checkpoint)
    return sharded


OTHER_LAYOUTS = [("zeros in float16", "etp4"), ("some bfloat16", "one rank")]


@pytest.mark.parametrize(("kind", "layout"), [*((kind, "tp2") for kind in KINDS), *OTHER_LAYOUTS])
def test_each_rank_is_loaded_with_its_slices(kind: str, layout: str, copy: Path) -> None:
    """Also in small pieces, of which many make a batch: scales of both dtypes lie side by side there."""
    as_other_tools(copy, kind)
    values = dequantised(written(all_tensors(copy)))
    for rank in {0, LAYOUTS[layout].world_size - 1}:
        for small in ({}, {"SLICE_BYTES": 5_000, "BATCH_BYTES": 20_000}):
            with patch.multiple(read_plan, **small) if small else nullcontext():
                sharded = loaded(copy, LAYOUTS[layout], rank)
            for mapping in sharded.registry:
                value = sharded.state[mapping.parameter.chunk, mapping.parameter.name]
                wanted = shard(mapping.parameter, values).to(torch.bfloat16)
                assert torch.equal(value.view(torch.uint8), wanted.view(torch.uint8)), (rank, mapping.megatron_param)


@pytest.mark.parametrize(("code", "row"), [(0x01, 0), (0x81, 130), (0x7F, 287)])
def test_one_code_under_a_scale_of_zero_is_an_error(code: int, row: int, copy: Path) -> None:
    def spoil(tensors: dict) -> None:
        KINDS["zeros everywhere"](tensors)
        tensors[Q].view(torch.uint8)[row, 159] = code

    edit_tensors(copy, spoil)
    with pytest.raises(ValueError, match=rf"{Q}_scale_inv: scale of block \[{row // 128}, 1\] is 0.0"):
        loaded(copy, LAYOUTS["one rank"], 0)


@pytest.mark.parametrize("params_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["e8m0", "bfloat16 and float16", "zeros in float16"])
def test_a_running_model_gives_back_what_it_was_loaded_with(
    kind: str, params_dtype: torch.dtype, copy: Path, tmp_path: Path
) -> None:
    as_other_tools(copy, kind)
    source = all_tensors(copy)
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(copy) as bridge:
        model = bridge.to_megatron_model(params_dtype=params_dtype)
        stream = dict(bridge.export_hf_weights(model, "source", device="cpu"))
        bridge.save_hf_pretrained(model, tmp_path / "out")
        parts = bridge.maybe_modify_loaded_hf_weight({"q": Q}, source)
    wanted = written(source)
    assert_same_tensors(all_tensors(tmp_path / "out"), wanted)
    assert_same_tensors(stream, {name: value for name, value in wanted.items() if "model.layers.2." not in name})
    assert torch.equal(parts["q"], dequantised(wanted)[Q])


def test_scales_of_a_dtype_that_is_not_known_are_refused_by_name(bridge_of_powers: MiniMaxM2Bridge) -> None:
    state = {Q: torch.zeros(288, 160).to(torch.float8_e4m3fn), Q + SCALE: torch.ones(3, 2, dtype=torch.float64)}
    with pytest.raises(ValueError, match=f"{Q}_scale_inv: found torch.float64, .*store the scales as float32"):
        bridge_of_powers.maybe_modify_loaded_hf_weight(Q, state)


@pytest.mark.parametrize("scales", ["source", "fresh"])
def test_a_float32_model_of_bfloat16_values_is_untouched(scales: str, checkpoint: Path, source: dict) -> None:
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(checkpoint) as bridge:
        model = bridge.to_megatron_model().float()
        found = dict(bridge.export_hf_weights(model, "source", scales=scales, device="cpu"))
    kept = {name: value for name, value in source.items() if "model.layers.2." not in name}
    if scales == "source":
        assert_same_tensors(found, kept)
    else:
        assert any(not torch.equal(found[name], kept[name]) for name in kept if name.endswith(SCALE))


# ------------------------------------------------------------------------------------------------------- powers of two


@pytest.fixture(scope="module")
def of_powers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    section = EDGY_CONFIG["quantization_config"] | {"scale_fmt": "ue8m0"}
    folder = tmp_path_factory.mktemp("powers") / "hf"
    make_checkpoint(folder, EDGY_CONFIG | {"quantization_config": section}, mtp_layers=1)
    return folder


@pytest.fixture
def bridge_of_powers(of_powers: Path):
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(of_powers) as bridge:
        yield bridge


def test_powers_of_two_stay_and_are_made(bridge_of_powers: MiniMaxM2Bridge, of_powers: Path, tmp_path: Path) -> None:
    bridge, source = bridge_of_powers, all_tensors(of_powers)
    model = bridge.to_megatron_model()
    save = partial(bridge.save_hf_pretrained, model)
    save(tmp_path / "untouched")
    assert_same_tensors(all_tensors(tmp_path / "untouched"), source)
    assert (tmp_path / "untouched/config.json").read_bytes() == (of_powers / "config.json").read_bytes()
    fresh = dict(bridge.export_hf_weights(model, "fp8", scales="fresh", device="cpu"))
    assert all(powers_of_two(scales_of(fresh)))
    assert torch.equal(fresh[Q + SCALE], quantize_blockwise(dequantised(source)[Q], scale_fmt="ue8m0")[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.37)
    weights = dict(bridge.export_hf_weights(model, "bf16", device="cpu"))
    save(tmp_path / "trained")
    found = all_tensors(tmp_path / "trained")
    assert all(powers_of_two(scales_of(found)))
    for name in quantized(found):
        codes, scales = requantize_blockwise(weights[name], source[name + SCALE], scale_fmt="ue8m0")
        assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(found[name + SCALE], scales)
    save(tmp_path / "plain", quantization=None)
    text = (tmp_path / "plain/config.json").read_text().lower()
    assert not [word for word in ("fp8", "float8", "e8m0") if word in text]


@pytest.mark.parametrize("lie", ["every scale", "one scale"])
def test_a_source_whose_scales_are_not_what_it_says(
    lie: str, checkpoint: Path, of_powers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(checkpoint if lie == "every scale" else of_powers, tmp_path / "source"))
    claim(folder, "ue8m0")
    if lie == "one scale":
        edit_tensors(folder, lambda tensors: tensors[W2 + SCALE][0, 0].mul_(1.25))
    with (
        caplog.at_level(logging.WARNING, "bridge"),
        model_parallel(),
        MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge,
    ):
        bridge.save_hf_pretrained(bridge.to_megatron_model(), tmp_path / "out")
    assert "is no power of two" in caplog.text
    assert_same_tensors(all_tensors(tmp_path / "out"), all_tensors(folder))
    wanted = json.loads((folder / "config.json").read_text())
    del wanted["quantization_config"]["scale_fmt"]
    assert json.loads((tmp_path / "out/config.json").read_text()) == wanted
