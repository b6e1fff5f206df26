"""A model whose parameters are of no one layer spec, or have another norm's shape, is refused with what was found."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import RankPool
from torch import distributed, nn

from bridge import FullDimKNorm, FullDimQNorm, MiniMaxM2Bridge, minimax_m2_block_spec, model_parallel
from bridge.weights.param_mapping import model_rows
from reference.config import ModelConfig
from reference.model_class import ModelClass
from reference.names import all_names
from reference.weights import MODEL_DIALECTS, Dialect

SMALL = ModelConfig(rotary_dim=64, num_hidden_layers=3, num_local_experts=2, num_experts_per_tok=1)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def attention_of(layer: Any, query: Any, key: Any, module: Any = None) -> None:
    from megatron.core.transformer.attention import SelfAttention

    layer.submodules.self_attention.module = module or SelfAttention
    slots = layer.submodules.self_attention.submodules
    slots.q_layernorm, slots.k_layernorm = query, key


def model_of(bridge: MiniMaxM2Bridge, change: Any) -> nn.Module:
    """A `GPTModel` whose layer specs `change(layers)` has changed."""
    from copy import deepcopy

    from megatron.core.models.gpt import GPTModel

    provider = bridge.provider_bridge(backend="local")
    spec: Any = minimax_m2_block_spec(provider.transformer_config, "local")
    spec.layer_specs = [deepcopy(layer) for layer in spec.layer_specs]
    change(spec.layer_specs)
    return GPTModel(provider.transformer_config, spec, **provider.gpt_model_arguments)


def head_norm(config: Any, hidden_size: int, eps: float) -> nn.Module:
    """megatron-core's own: the weight of one head."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return WrappedTorchNorm(config, hidden_size, eps)


def second_layer_differs(layers: list[Any]) -> None:
    attention_of(layers[1], FullDimQNorm, FullDimKNorm)


def norms_of_one_head(layers: list[Any]) -> None:
    for layer in layers:
        attention_of(layer, head_norm, head_norm)


def no_key_norm(layers: list[Any]) -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    for layer in layers:
        attention_of(layer, FullDimQNorm, IdentityOp)


def no_norms(layers: list[Any]) -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    for layer in layers:
        attention_of(layer, IdentityOp, IdentityOp)


REFUSED = {
    second_layer_differs: (
        r"decoder\.layers\.1\.self_attention\.q_layernorm\.weight: found beside "
        r"decoder\.layers\.0\.self_attention\.qk_norm\.q_weight, but the one is a name in megatron_local_drop_in and "
        "megatron_te_drop_in, the other in megatron_local and megatron_te; give all layers one spec"
    ),
    norms_of_one_head: (
        r"decoder\.layers\.0\.self_attention\.q_layernorm\.weight: found shape \[{head_dim}\], expected \[{query}\]; "
        r"MiniMax-M2 norms all heads at once, .* put bridge\.FullDimQNorm and bridge\.FullDimKNorm into the slots"
    ),
    no_key_norm: r"decoder\.layers\.0\.self_attention\.k_layernorm\.weight: the model lacks this parameter",
    no_norms: r"decoder\.layers\.0\.self_attention\.qk_norm\.q_weight: the model lacks this parameter",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_model_that_is_not_of_one_spec_is_refused_and_unchanged(checkpoint: Path, change: Any) -> None:
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(checkpoint) as bridge:
        model = model_of(bridge, change)
        before = {name: value.clone() for name, value in model.state_dict().items() if value is not None}
        config = bridge.config
        said = REFUSED[change].replace("{head_dim}", str(config.head_dim))
        said = said.replace("{query}", str(config.num_attention_heads * config.head_dim))
        with pytest.raises(ValueError, match=said):
            bridge.load_hf_weights(model)
        with pytest.raises(ValueError, match=said):
            list(bridge.export_hf_weights(model))
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_stages_of_different_specs_are_refused_on_every_rank(ranks: RankPool, checkpoint: Path) -> None:
    said = ranks.call(_stages_of_different_specs, str(checkpoint))
    assert said[0] == said[1]
    assert said[0].startswith("ranks have different layer specs: ")
    assert "megatron_local_drop_in" in said[0]


def _stages_of_different_specs(folder: str) -> str:
    from megatron.core.models.gpt import GPTModel

    from bridge.model.build import build_model

    sizes = {"pipeline_model_parallel_size": 2}
    with model_parallel(**sizes), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
        if distributed.get_rank() == 0:
            model = build_model(bridge.config)
        else:
            provider = bridge.provider_bridge(backend="local", **sizes)
            spec: Any = minimax_m2_block_spec(provider.transformer_config, "local")
            for layer in spec.layer_specs:
                attention_of(layer, FullDimQNorm, FullDimKNorm)
            ends = {"pre_process": False, "post_process": True}
            model = GPTModel(provider.transformer_config, spec, **provider.gpt_model_arguments, **ends)
        with pytest.raises(ValueError, match="ranks have different") as caught:
            bridge.load_hf_weights(model)
        return str(caught.value)


# --------------------------------------------------------------------------------------------- from the names alone

PAIRS = [
    (one, other) for dialects in MODEL_DIALECTS.values() for one in dialects for other in dialects if one is not other
]


@settings(max_examples=100, deadline=None)
@given(pair=st.sampled_from(PAIRS), data=st.data())
def test_any_mixture_of_two_dialects_is_named(pair: tuple[Dialect, Dialect], data: st.DataObject) -> None:
    """Any layers and kinds of weights named as elsewhere: found out if, and only if, some dialect lacks the names."""
    one, other = (all_names(SMALL, dialect) for dialect in pair)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(one), max_size=len(one)))
    mixed = [theirs if swap else ours for ours, theirs, swap in zip(one, other, chosen, strict=True)]
    (dialects,) = (dialects for dialects in MODEL_DIALECTS.values() if pair[0] in dialects)
    fitting = [dialect for dialect in dialects if set(mixed) <= set(all_names(SMALL, dialect))]
    if fitting:
        assert list(model_rows(mixed, dialects)) == fitting
        return
    with pytest.raises(ValueError, match=r": found beside .*; give all layers one spec") as caught:
        model_rows(mixed, dialects)
    named = re.match(r"(\S+): found beside (\S+), but", str(caught.value))
    assert named is not None
    assert set(named.groups()) <= set(mixed)
    assert not any(set(named.groups()) <= set(all_names(SMALL, dialect)) for dialect in dialects)


@pytest.mark.parametrize("kind", ModelClass)
def test_a_name_of_no_dialect_is_named_before_a_mixture(kind: ModelClass) -> None:
    dialects = MODEL_DIALECTS[kind]
    names = [*all_names(SMALL, dialects[0])[:5], "decoder.layers.0.self_attention.linear_qkv.bias"]
    with pytest.raises(ValueError, match=r"linear_qkv\.bias: not a parameter of a MiniMax-M2 model"):
        model_rows(names, dialects)
