"""megatron-bridge with the plug-in in one process: registration, provider, registry, weights in and out."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from support.checkpoints import SCALE, edit_tensors
from support.megatron_bridge import (
    CONFIG,
    build,
    check_export,
    check_files,
    check_parameters,
    make_folder,
    plugin,
    provider_at,
)
from support.sharded_models import truth_of
from transformers import MiniMaxM2Config, Qwen3MoeConfig

from bridge import model_parallel
from bridge.huggingface.checkpoint import same_bits
from bridge.model.config import gpt_model_arguments, transformer_config
from reference.config import ModelConfig
from reference.fp8 import dequantize_blockwise
from reference.parallelism import Parallelism
from reference.sharding import parameters
from reference.weights import Dialect

# isort: split
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.core.transformer.transformer_config import TransformerConfig

pytestmark = pytest.mark.plugins

W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
AUTO_MAP = {"AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM"}  # as the released config.json has it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint with two MTP layers. Do not write to it."""
    return make_folder(tmp_path_factory.mktemp("source") / "toy")


@pytest.fixture(scope="module")
def loaded(folder: Path):
    """(the host's bridge, the model that it builds and loads), in process groups of one rank."""
    auto = AutoBridge.from_hf_pretrained(folder)
    with model_parallel():
        yield auto, build(auto, Parallelism())


def hf_config(**changes) -> MiniMaxM2Config:
    return MiniMaxM2Config(**CONFIG | changes)


# --------------------------------------------------------------------------------------------- registration, provider


@pytest.mark.parametrize("changes", [{}, {"auto_map": AUTO_MAP}], ids=["transformers' class", "auto_map"])
def test_the_host_finds_our_bridge(changes):
    assert type(AutoBridge.from_hf_config(hf_config(**changes))._model_bridge) is plugin.MiniMaxM2Bridge


def test_other_architectures_keep_the_hosts_bridge():
    other = AutoBridge.from_hf_config(Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"]))
    assert type(other._model_bridge).__module__.startswith("megatron.bridge.")


def test_the_provider_is_our_configuration(folder: Path):
    """Field by field, but for one of the host's, which saves memory between pipeline stages."""
    config = ModelConfig.from_hf(CONFIG)
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=False)
    provider.finalize()
    ours = transformer_config(config, autocast_dtype=torch.bfloat16)
    different = [
        field.name
        for field in fields(TransformerConfig)
        if getattr(provider, field.name) != getattr(ours, field.name) and not field.name.endswith("init_method")
    ]
    assert different == ["deallocate_pipeline_outputs"]
    names = {"max_sequence_length": "seq_length"}
    arguments = gpt_model_arguments(config)
    assert {name: getattr(provider, names.get(name, name)) for name in arguments} == arguments


@pytest.mark.parametrize(
    "rope",
    [
        {"rotary_dim": 24, "rope_theta": 5e6},
        {"rotary_dim": None, "rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}},
    ],
    ids=["released", "transformers"],
)
def test_both_dialects_rotate_the_same_channels(rope):
    provider = AutoBridge.from_hf_config(hf_config(**rope)).to_megatron_provider(load_weights=False)
    assert int(provider.kv_channels * provider.rotary_percent) == 24
    assert provider.rotary_base == 5e6


def test_a_config_without_a_rotary_width_is_refused():
    """transformers 5.12 takes it for full rotation."""
    config = hf_config(rotary_dim=None)
    with pytest.raises(ValueError, match="rotary_dim"):
        AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)


def test_a_model_of_another_architecture_is_refused():
    with pytest.raises(
        ValueError, match=r"^config.json: model_type is 'qwen3_moe', but only 'minimax_m2' is supported"
    ):
        plugin.MiniMaxM2Bridge().provider_bridge(type("Pretrained", (), {"config": Qwen3MoeConfig()}))


def test_layers_that_do_not_divide_are_spread():
    provider = AutoBridge.from_hf_config(hf_config(num_hidden_layers=62)).to_megatron_provider(load_weights=False)
    provider.pipeline_model_parallel_size = 4
    provider.finalize()
    stages = provider.pipeline_model_parallel_layout.layout
    assert [sum(kind.name == "decoder" for kind in stage[0]) for stage in stages] == [15, 16, 16, 15]


def test_what_the_caller_says_of_the_stages_holds():
    provider = AutoBridge.from_hf_config(hf_config(num_hidden_layers=7)).to_megatron_provider(load_weights=False)
    provider.pipeline_model_parallel_size, provider.num_layers_in_first_pipeline_stage = 2, 3
    provider.finalize()
    assert provider.pipeline_model_parallel_layout is None


def test_virtual_stages_on_two_ranks_do_not_mix_up_their_messages():
    provider = AutoBridge.from_hf_config(hf_config(num_hidden_layers=4)).to_megatron_provider(load_weights=False)
    provider.pipeline_model_parallel_size = provider.virtual_pipeline_model_parallel_size = 2
    provider.finalize()
    assert (provider.overlap_p2p_comm, provider.batch_p2p_comm) == (True, False)


# ----------------------------------------------------------------------------------------------- registry and weights


@pytest.mark.parametrize("dialect", [Dialect.MEGATRON_TE, Dialect.MEGATRON_LOCAL])
@pytest.mark.parametrize("slots", [False, True], ids=["our attention", "norm slots"])
def test_the_registry_knows_every_parameter(dialect: Dialect, slots: bool):
    registry = plugin.MiniMaxM2Bridge().mapping_registry()
    for parameter in parameters(ModelConfig.from_hf(CONFIG), Parallelism(), 0, dialect):
        name = parameter.name
        if slots:
            name = name.replace("qk_norm.q_", "q_layernorm.").replace("qk_norm.k_", "k_layernorm.")
        mapping = registry.megatron_to_hf_lookup(name)
        found = mapping.hf_param if isinstance(mapping.hf_param, dict) else {"": mapping.hf_param}
        assert tuple(found.values()) == parameter.sources
        assert isinstance(mapping, plugin._FullDimQKNormMapping) == ("_norm.weight" in parameter.sources[0])


def test_loaded_and_exported_bit_for_bit(loaded, folder: Path):
    auto, models = loaded
    check_parameters(models, auto, Parallelism(), 0)
    check_export(auto.export_hf_weights(models, show_progress=False), truth_of(str(folder)))


def test_the_hosts_stream_into_the_model_is_dequantised(loaded):
    auto, models = loaded
    state = models[0].module.state_dict()
    streamed = list(auto._model_bridge.stream_weights_hf_to_megatron(auto.hf_pretrained, models))
    assert len(streamed) == len([value for value in state.values() if isinstance(value, torch.Tensor)])
    for name, weight, _ in streamed:
        assert torch.equal(weight.to(state[name].dtype), state[name]), name


def test_a_float32_model_is_exported_in_the_sources_dtypes(loaded, folder: Path):
    """By our stream, and by the host's tasks."""
    auto, _ = loaded
    dtypes = dict.fromkeys(("params_dtype", "pipeline_dtype", "autocast_dtype"), torch.float32)
    models = build(auto, Parallelism(), bf16=False, **dtypes)
    assert {parameter.dtype for parameter in models[0].parameters()} == {torch.float32}
    for tasks in (None, auto.get_conversion_tasks(models)):
        exported = auto.export_hf_weights(models, show_progress=False, conversion_tasks=tasks)
        check_export(exported, truth_of(str(folder)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_dtype_gives_plain_weights(loaded, folder: Path, dtype: torch.dtype):
    auto, models = loaded
    whole = {name: value for name, value in truth_of(str(folder)).whole.items() if ".layers.3." not in name}
    whole = {name: value for name, value in whole.items() if ".layers.4." not in name}
    found = dict(auto.export_hf_weights(models, show_progress=False, weight_dtype=dtype))
    assert found.keys() == whole.keys()
    assert [name for name, value in found.items() if not same_bits(value, whole[name].to(dtype))] == []


@pytest.mark.parametrize("plain", [False, True], ids=["float8", "plain"])
def test_the_hosts_own_saving_gives_a_whole_checkpoint(loaded, folder: Path, tmp_path: Path, plain: bool):
    """With the MTP layers, and a config.json that says what the weights are; again after it was saved once."""
    auto, models = loaded
    for out in (tmp_path / "first", tmp_path / "second"):
        auto.save_hf_pretrained(models, out, weight_dtype=torch.bfloat16 if plain else None)
        check_files(out, truth_of(str(folder)), plain=plain)
        written, source = (json.loads((at / "config.json").read_text()) for at in (out, folder))
        assert written == {key: value for key, value in source.items() if key != "quantization_config" or not plain}
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.items() <= json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].items()


def test_a_changed_weight_is_encoded_anew_and_no_other(loaded, folder: Path):
    """By our stream, and by the host's tasks."""
    auto, models = loaded
    name = "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"
    weight, disk = models[0].module.get_parameter(name), truth_of(str(folder)).disk
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[: CONFIG["intermediate_size"]] *= 3
        for tasks in (None, auto.get_conversion_tasks(models)):
            found = dict(auto.export_hf_weights(models, show_progress=False, conversion_tasks=tasks))
            assert {name for name in found if not same_bits(found[name], disk[name])} <= {W1, W1 + SCALE}
            value = dequantize_blockwise(found[W1], found[W1 + SCALE], dtype=torch.float32)
            error = (value - weight[: CONFIG["intermediate_size"]].float()).abs().max()
            assert error <= 448 * found[W1 + SCALE].max() / 2**4  # half a step of e4m3's 3 bits at the largest value
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_checkpoint_of_other_sizes_is_refused_before_anything_changes(loaded, tmp_path: Path):
    auto, models = loaded
    other = make_folder(tmp_path / "other", CONFIG | {"intermediate_size": 80})
    before = [value.clone() for value in models[0].parameters()]
    with pytest.raises(ValueError, match=r"linear_fc1.weight: found shape \[144, 160\], expected \[160, 160\]"):
        auto.load_hf_weights(models, other)
    assert all(torch.equal(value, old) for value, old in zip(models[0].parameters(), before, strict=True))


def test_missing_scales_are_refused_by_both_loops(loaded, tmp_path: Path):
    auto, models = loaded
    damaged = make_folder(tmp_path / "damaged")
    edit_tensors(damaged, lambda tensors: tensors.pop(W1 + SCALE))
    with pytest.raises(ValueError, match=W1):
        auto.load_hf_weights(models, damaged)
    state = AutoBridge.from_hf_pretrained(damaged).hf_pretrained
    with pytest.raises(ValueError, match=f"{W1}: float8 without its scales"):
        MegatronModelBridge.load_weights_hf_to_megatron(auto._model_bridge, state, models)


def test_a_loaded_weight_is_dequantised_as_the_law_says(folder: Path):
    bridge, truth = plugin.MiniMaxM2Bridge(), truth_of(str(folder))
    both = bridge.maybe_modify_loaded_hf_weight({"gate": W1, "norm": "model.norm.weight"}, truth.disk)
    assert same_bits(both["gate"], truth.whole[W1])
    assert both["norm"] is truth.disk["model.norm.weight"]
    assert same_bits(bridge.maybe_modify_loaded_hf_weight(W1, truth.disk), truth.whole[W1])
    with pytest.raises(ValueError, match=f"{W1}.*scale"):
        bridge.maybe_modify_loaded_hf_weight(W1, truth.disk | {W1 + SCALE: truth.disk[W1 + SCALE][:, :1]})


def test_the_provider_can_be_finalised_twice(folder: Path):
    provider = provider_at(AutoBridge.from_hf_pretrained(folder), Parallelism(pp=2))
    layout = provider.pipeline_model_parallel_layout
    provider.finalize()
    assert provider.pipeline_model_parallel_layout is layout
