"""megatron-bridge's own checkpoints of a model that the plug-in built, its conversion command's path, and adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.checkpoints import SCALE
from support.checks import ROOT
from support.megatron_bridge import CONFIG, build, check_export, check_files, make_folder, plugin
from support.readmes import blocks
from support.sharded_models import truth_of

from bridge import model_parallel
from bridge.huggingface.checkpoint import same_bits
from reference.fp8 import dequantize_blockwise
from reference.parallelism import Parallelism

# isort: split
from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA

pytestmark = pytest.mark.plugins

TARGETS = ("linear_qkv", "linear_proj")
LORA_RANK, LORA_ALPHA = 4, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint with two MTP layers. Do not write to it."""
    return make_folder(tmp_path_factory.mktemp("source") / "toy")


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's checkpoint of it. Do not write to it."""
    out = tmp_path_factory.mktemp("saved") / "megatron"
    with model_parallel():
        auto = AutoBridge.from_hf_pretrained(folder)
        auto.save_megatron_model(build(auto, Parallelism()), out, hf_tokenizer_path=folder)
    return out


def test_the_checkpoint_names_the_provider_and_the_layer_spec(saved: Path):
    (run_config,) = saved.rglob("run_config.yaml")
    model = yaml.safe_load(run_config.read_text())["model"]
    assert model["_target_"] == f"{plugin.MiniMaxM2ModelProvider.__module__}.MiniMaxM2ModelProvider"
    assert model["transformer_layer_spec"]["_target_"] == "bridge.model.layer_spec.minimax_m2_block_spec"


def test_the_checkpoint_is_loaded_and_exported_bit_for_bit(folder: Path, saved: Path, tmp_path: Path):
    with model_parallel():
        auto = AutoBridge.from_hf_pretrained(folder)
        models = auto.load_megatron_model(saved, wrap_with_ddp=False)
        check_export(auto.export_hf_weights(models, show_progress=False), truth_of(str(folder)))
        auto.save_hf_pretrained(models, tmp_path / "exported")
    check_files(tmp_path / "exported", truth_of(str(folder)))


def test_a_bridge_made_of_the_checkpoint_and_a_config_exports_plain_weights(folder: Path, saved: Path, tmp_path: Path):
    """The host's flow without a source of weights: there is nothing to keep scales of."""
    with model_parallel():
        auto = AutoBridge.from_auto_config(str(saved), str(folder))
        models = auto.load_megatron_model(saved, wrap_with_ddp=False)
        auto.save_hf_pretrained(models, tmp_path / "exported")
    found, whole = truth_of(str(tmp_path / "exported")).disk, truth_of(str(folder)).whole
    assert found.keys() == {name for name in whole if ".layers.3." not in name and ".layers.4." not in name}
    assert [name for name, value in found.items() if not same_bits(value, whole[name].to(value.dtype))] == []
    written = json.loads((tmp_path / "exported/config.json").read_text())
    assert {name: written[name] for name in ("rotary_dim", "num_local_experts")} == {
        name: CONFIG[name] for name in ("rotary_dim", "num_local_experts")
    }


def test_the_readmes_lines_run_beside_a_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = [block for block in blocks(ROOT / "bridge/plugins/README.md") if block.need == "megatron-bridge"]
    (tmp_path / "checkpoint").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in found:
        exec(block.code, names)
    assert type(names["provider"]) is type(names["config"].model) is plugin.MiniMaxM2ModelProvider


def test_a_merged_adapter_is_encoded_and_every_other_weight_keeps_its_bytes(folder: Path):
    """The truth of a merged weight is base + alpha/rank x B A, rounded to bfloat16 once the host has added them."""
    truth = truth_of(str(folder))
    with model_parallel():
        auto = AutoBridge.from_hf_pretrained(folder)
        provider = auto.to_megatron_provider()
        provider.register_pre_wrap_hook(
            lambda chunks: LoRA(target_modules=list(TARGETS), dim=LORA_RANK, alpha=LORA_ALPHA)(chunks, training=True)
        )
        provider.finalize()
        models = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        generator, adapters = torch.Generator().manual_seed(4), {}
        with torch.no_grad():
            for name, parameter in models[0].module.named_parameters():
                if ".adapter." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
                    adapters[name] = parameter.detach().float()
        merged = {name: value.clone() for name, value in auto.export_hf_weights(models, show_progress=False)}
        base = {
            name: value.clone()
            for name, value in auto.export_hf_weights(models, show_progress=False, merge_adapter_weights=False)
        }
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    touched = {
        name for name in truth.disk if name.removesuffix(SCALE).endswith(tuple(f"{x}.weight" for x in attention))
    }
    assert {name for name, value in merged.items() if not same_bits(value, truth.disk[name])} == touched
    assert {name.replace(".base_layer.", ".") for name in base} == merged.keys()
    assert [name for name, x in base.items() if not same_bits(x, truth.disk[name.replace(".base_layer.", ".")])] == []

    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        prefix = f"decoder.layers.{layer}.self_attention.linear_proj.adapter."
        inner, outer = adapters[prefix + "linear_in.weight"], adapters[prefix + "linear_out.weight"]
        exact = truth.whole[name].float() + LORA_ALPHA / LORA_RANK * outer @ inner
        found = dequantize_blockwise(merged[name], merged[name + SCALE], block_size=128, dtype=torch.float32)
        # Half a step of e4m3 is 1/16 of a value, or 2^-10 scales below the normal ones; bfloat16 adds 2^-8 twice.
        assert ((found - exact).abs() <= exact.abs() * (1 / 16 + 2**-7) + merged[name + SCALE].max() * 2**-9).all()
