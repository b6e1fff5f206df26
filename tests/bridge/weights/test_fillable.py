"""A model that would compute something else with the checkpoint's weights is not filled, though shapes are the same."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from support.optimizer_steps import KEPT, made_of
from support.ranks import RankPool

from bridge import MiniMaxM2Bridge
from bridge.huggingface.random_checkpoint import SMALL_CONFIG, make_checkpoint
from bridge.model.layer_spec import minimax_m2_block_spec
from bridge.model.process_groups import model_parallel

OWN_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "base of the rotation": ({"rotary_base": 10000}, r"inv_freq: found .* expected .* rotary_base=5e\+06"),
    "share that rotates": ({"rotary_percent": 1.0}, r"inv_freq: found 24 from .* expected 12 .* rotary_percent=0.5"),
    "no rotation": ({"position_embedding_type": "none"}, "position_embedding_type='none': queries and keys would not"),
    "scaled positions": ({"seq_len_interpolation_factor": 4.0}, "seq_len_interpolation_factor=4.0: positions"),
    "scaled frequencies": ({"rope_scaling": True}, "inv_freq: found"),
}
OWN_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "experts of a token": ({"moe_router_topk": 1}, "moe_router_topk=1: the model's config has num_experts_per_tok=2"),
    "epsilon": ({"layernorm_epsilon": 0.1}, "layernorm_epsilon=0.1: the model's config has rms_norm_eps"),
    "heads of other sizes": ({"num_attention_heads": 2, "num_query_groups": 2, "kv_channels": 64}, "num_attention_he"),
    "scores": ({"moe_router_score_function": "softmax"}, "moe_router_score_function='softmax': with the same weights"),
    "window": ({"window_size": (4, 0)}, r"window_size=\(4, 0\): with the same weights"),
    "size of expert parallelism": ({"expert_model_parallel_size": 2}, "expert_model_parallel_size=2: .* the size 1"),
}


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Any:
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(checkpoint) as opened:
        yield opened


def model_of(source: MiniMaxM2Bridge, **arguments: Any) -> GPTModel:
    """As the README builds one by hand, with some arguments otherwise."""
    provider = source.provider_bridge(params_dtype=torch.float32)
    config = provider.transformer_config
    spec = minimax_m2_block_spec(config)
    return GPTModel(config, spec, **provider.gpt_model_arguments | arguments)


def refused(source: MiniMaxM2Bridge, model: GPTModel, said: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items() if value is not None}
    with pytest.raises(ValueError, match=said):
        source.load_hf_weights(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if value is not None)


@pytest.mark.parametrize("name", OWN_ARGUMENTS)
def test_another_rotation_is_refused(source: MiniMaxM2Bridge, name: str) -> None:
    arguments, said = OWN_ARGUMENTS[name]
    refused(source, model_of(source, **arguments), said)


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_other_settings_are_refused(source: MiniMaxM2Bridge, name: str) -> None:
    """Which shapes do not tell; here they come in after the model is built, as past a spec that is not ours."""
    settings, said = OWN_SETTINGS[name]
    model = model_of(source)
    for field, value in settings.items():
        setattr(model.config, field, value)
    refused(source, model, said)


def test_the_provider_s_own_is_filled(source: MiniMaxM2Bridge) -> None:
    """Without a word."""
    model = model_of(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.load_hf_weights(model)


@pytest.mark.parametrize("distributed", [True, False])
def test_copies_that_an_optimizer_has_are_said(source: MiniMaxM2Bridge, distributed: bool) -> None:
    """What is advised keeps the loaded weights through a step of no length; without it they are lost."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    kept = []
    for reload in (True, False):
        model = source.to_megatron_model(load_weights=False, perform_initialization=True)
        ddp = DistributedDataParallelConfig(**KEPT | {"use_distributed_optimizer": distributed})
        wrapped = DistributedDataParallel(model.config, ddp, model)
        optimizer = made_of(wrapped, torch.bfloat16, lr=0.0, weight_decay=0.0)
        with pytest.warns(UserWarning, match=r"call optimizer\.reload_model_params\(\) after load_hf_weights"):
            source.load_hf_weights(wrapped)
        if reload:
            optimizer.reload_model_params()
        loaded = model.embedding.word_embeddings.weight.detach().clone()
        for parameter in wrapped.parameters():
            parameter.main_grad.zero_()
        optimizer.step()
        kept.append(torch.equal(model.embedding.word_embeddings.weight, loaded))
    assert kept == [True, False]


def sizes_on_ranks(folder: Path) -> tuple[int, str]:
    """Of experts over two ranks: what the provider says of them, and what a config without them meets."""
    with model_parallel(expert_model_parallel_size=2), MiniMaxM2Bridge.from_hf_pretrained(folder) as opened:
        provider = opened.provider_bridge()
        opened.load_hf_weights(model_of(opened))
        with pytest.raises(ValueError, match="expert_model_parallel_size=1") as said:
            opened.to_megatron_model(expert_model_parallel_size=1)
        return provider.transformer_config.expert_model_parallel_size, str(said.value)


def test_the_provider_has_the_sizes_of_the_groups(tmp_path: Path) -> None:
    """Without them megatron-core averages gradients of experts over ranks that have others."""
    make_checkpoint(tmp_path / "source", SMALL_CONFIG)
    with RankPool(2) as ranks:
        for size, said in ranks.call(sizes_on_ranks, tmp_path / "source"):
            assert size == 2
            assert "process groups have the size 2, and gradients would be added up over the wrong ranks" in said
