"""Checkpoints and their models, for the tests of `bridge.plugins.megatron_bridge`; imports the host and the plug-in."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import support.transformer_engine_names  # noqa: F401
from bridge.huggingface.checkpoint import same_bits
from bridge.huggingface.random_checkpoint import make_checkpoint
from bridge.weights.param_mapping import model_state
from reference.parallelism import Parallelism
from reference.sharding import parameters, shard
from reference.weights import Dialect
from support.checkpoints import EDGY_CONFIG, SCALE
from support.sharded_models import Truth, truth_of

# Only now can these be imported.
import bridge.plugins.megatron_bridge as plugin  # isort: skip
from megatron.bridge import AutoBridge  # isort: skip

# Odd sizes that two ranks can share: three layers on two stages, a vocabulary to fill up, edge blocks. Two MTP layers.
CONFIG = EDGY_CONFIG | {"num_hidden_layers": 3, "num_local_experts": 4, "num_mtp_modules": 2}
CONFIGS = {"two key heads": CONFIG, "one key head": CONFIG | {"num_key_value_heads": 1}}


def make_folder(folder: Path, config: dict[str, Any] = CONFIG) -> Path:
    """An FP8 checkpoint in several files, with a tokenizer that the host can load and save."""
    make_checkpoint(folder, config, seed=3, mtp_layers=config["num_mtp_modules"], max_shard_bytes=150_000)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return folder


def provider_at(auto: AutoBridge, layout: Parallelism, **fields: Any) -> plugin.MiniMaxM2ModelProvider:
    """The provider that users get, at a layout, ready to build."""
    provider = auto.to_megatron_provider()
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "sequence_parallel": layout.tp > 1,
    }
    for name, value in (sizes | fields).items():
        assert hasattr(provider, name)
        setattr(provider, name, value)
    provider.finalize()
    return provider


def build(auto: AutoBridge, layout: Parallelism, **fields: Any) -> list[nn.Module]:
    """This rank's chunks, with the checkpoint's weights."""
    return provider_at(auto, layout, **fields).provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True
    )


def check_parameters(models: list[nn.Module], auto: AutoBridge, layout: Parallelism, rank: int) -> None:
    """Every parameter is the rank's slice of the files, bit for bit."""
    config = plugin.conversion.ModelConfig.from_hf(auto.hf_pretrained.config.to_dict())
    states = [model_state(chunk) for chunk in unwrapped(models)]
    held = parameters(config, layout, rank, Dialect.MEGATRON_LOCAL)
    assert {(chunk, name) for chunk, state in enumerate(states) for name in state} == {(p.chunk, p.name) for p in held}
    whole = truth_of(str(auto.hf_pretrained.model_name_or_path)).whole
    for parameter in held:
        value = states[parameter.chunk][parameter.name]
        assert same_bits(value, shard(parameter, whole).to(value.dtype)), parameter.name


def check_export(exported: Any, truth: Truth) -> None:
    """Every weight of the model, and no other tensor, has the bytes of the file."""
    found = {name: value.clone() for name, value in exported}
    assert found.keys() == {name for name in truth.disk if not is_mtp(name)}
    for name, value in found.items():
        assert same_bits(value, truth.disk[name]), name


def check_files(folder: Path, truth: Truth, *, plain: bool = False) -> None:
    """The folder has the bytes of the source; `plain`: weights in bfloat16, without scales."""
    saved = truth_of(str(folder)).disk
    expected = truth.disk if not plain else {name: x for name, x in truth.disk.items() if not name.endswith(SCALE)}
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(saved[name], truth.whole[name].to(saved[name].dtype) if plain else value), name


def forward_step(batches: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable]:
    """The mean loss of a batch of sequences, for megatron-core's schedules."""
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
    output = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return output, lambda losses: (losses.mean(), {"loss": losses.mean().detach()})


def with_norms_of_the_host(config: Any) -> Any:
    """Our layer with megatron-core's attention and the norms of the host's own bridge, whose spec needs a GPU."""
    from megatron.bridge.models.minimax_m2.minimax_m2_provider import FullDimKNorm, FullDimQNorm
    from megatron.core.transformer.attention import SelfAttention

    from bridge.model.layer_spec import minimax_m2_block_spec

    block = minimax_m2_block_spec(config)
    for layer in block.layer_specs:
        layer.submodules.self_attention.module = SelfAttention
        norms = layer.submodules.self_attention.submodules
        norms.q_layernorm, norms.k_layernorm = FullDimQNorm, FullDimKNorm
    return block


def unwrapped(models: list[nn.Module]) -> list[nn.Module]:
    return [getattr(model, "module", model) for model in models]


def is_mtp(name: str) -> bool:
    """By the numbers that the layers past the model's have."""
    return any(name.startswith(f"model.layers.{layer}.") for layer in (3, 4))
