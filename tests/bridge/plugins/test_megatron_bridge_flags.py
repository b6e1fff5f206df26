"""The flags under which `bench train` measures megatron-bridge's layers are those of its own provider."""

import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import support.transformer_engine_names  # noqa: F401  # from here on the host can be imported
import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.minimax_m2.minimax_m2_bridge import MiniMaxM2Bridge as HostsBridge
from megatron.bridge.utils import fusions
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import MiniMaxM2Config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from train_rows import ACCUMULATED, PEER_FLAGS

from bridge.huggingface.random_checkpoint import SMALL_CONFIG
from bridge.model.config import GPU_SETTINGS, transformer_config
from bridge.plugins.megatron_bridge.provider import provider_of
from reference.config import ModelConfig

pytestmark = [pytest.mark.plugins, pytest.mark.skipif(torch.cuda.is_available(), reason="settings of a processor")]

# Theirs does not look at the host, which has neither a GPU nor Transformer Engine here.
OF_THE_HOST = {"use_cpu_initialization", "transformer_impl", "moe_grouped_gemm"}
OF_THE_CALLER = {"pipeline_dtype"}  # who sets it where there are stages


def test_a_default_gives_way_to_routing_replay() -> None:
    config = {key: value for key, value in SMALL_CONFIG.items() if key != "quantization_config"}
    provider = provider_of(ModelConfig.from_hf(config), torch.bfloat16)
    provider.moe_router_fusion = True  # as on a GPU
    provider.finalize()
    assert provider.moe_router_fusion
    provider.moe_enable_routing_replay = True
    provider.finalize()
    assert not provider.moe_router_fusion


def test_peer_flags_are_what_the_hosts_provider_sets_otherwise() -> None:
    config = {key: value for key, value in SMALL_CONFIG.items() if key != "quantization_config"}
    pretrained = SimpleNamespace(config=MiniMaxM2Config(**config), generation_config=None)
    theirs = HostsBridge().provider_bridge(pretrained)
    permute, theirs.moe_permute_fusion = theirs.moe_permute_fusion, False  # which is refused on this host
    theirs.finalize()
    theirs.moe_permute_fusion = permute
    ours = transformer_config(ModelConfig.from_hf(config), autocast_dtype=torch.bfloat16)
    for name, value in GPU_SETTINGS.items():
        setattr(ours, name, value)
    different = {
        field.name: getattr(theirs, field.name)
        for field in fields(TransformerConfig)
        if getattr(theirs, field.name) != getattr(ours, field.name) and not field.name.endswith("init_method")
    }
    assert {name: value for name, value in different.items() if name not in OF_THE_HOST | OF_THE_CALLER} == {
        name: value
        for name, value in PEER_FLAGS.items()
        if name != "cross_entropy_fusion_impl"  # as it is in ours
    }
    assert theirs.cross_entropy_fusion_impl == PEER_FLAGS["cross_entropy_fusion_impl"]
    (asked,) = [field for field in fields(GPTModelProvider) if field.name in ACCUMULATED]
    assert asked.default_factory is fusions.can_enable_gradient_accumulation_fusion
