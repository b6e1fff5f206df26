"""Which layers a chunk holds, and what is said of a model that is not MiniMax-M2's."""

import pytest
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from support.small_model import SMALL
from torch import nn

from bridge.model.build import build_hybrid_model, build_model
from bridge.model.config import gpt_model_arguments, transformer_config
from bridge.model.process_groups import model_parallel
from bridge.weights.decoder_layers import HeldLayers, held_layers
from reference.model_class import ModelClass


@pytest.fixture(autouse=True)
def _groups():
    with model_parallel():
        yield


@pytest.mark.parametrize("kind", ModelClass)
def test_layers_count_over_the_model(kind):
    assert held_layers(build_model(SMALL, model=kind)) == HeldLayers(kind, [0, 1], {(0, 1, 2, 3)})


@pytest.mark.parametrize(("stage", "layers"), [(0, []), (1, [0]), (2, [1])])
def test_stages_of_a_pattern(stage, layers):
    chunk = build_hybrid_model(SMALL, pattern="|*E|*E", vp_stage=stage)
    assert held_layers(chunk).layers == layers


# What the layers are, as the first stage's symbols, and what is said of them.
OTHERS = {
    "Mamba": ("ME*E", r"decoder\.layers\.0: found 'M' in the pattern, expected '\*' \(attention\)"),
    "dense": ("*E*-", r"decoder\.layers\.3: found '-' in the pattern, expected 'E' \(experts\)"),
    "experts first": ("E*E*", r"decoder\.layers\.0: found 'E' in the pattern, expected '\*'"),
    "two of attention": ("*E**", r"decoder\.layers\.3: found '\*' in the pattern, expected 'E'"),
}


@pytest.mark.parametrize(("kinds", "message"), OTHERS.values(), ids=OTHERS)
def test_the_first_layer_that_does_not_fit_is_named(kinds, message):
    model = build_hybrid_model(SMALL)
    model.decoder.layer_type_list = list(kinds)
    with pytest.raises(ValueError, match=message):
        held_layers(model)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_is_cut_off_inside_a_layer_is_named(stage):
    chunk = build_hybrid_model(SMALL, pattern="*E*|E", vp_stage=stage)
    with pytest.raises(ValueError, match=r"decoder\.layers\.3: a pipeline stage is cut off before it, inside layer 1"):
        held_layers(chunk)


def test_a_dense_layer_is_named():
    config = transformer_config(SMALL, backend="local")
    model = GPTModel(config, get_gpt_layer_local_spec(), **gpt_model_arguments(SMALL))
    with pytest.raises(ValueError, match=r"decoder\.layers\.0: found MLP, expected experts \(MoELayer\)"):
        held_layers(model)


def test_another_class_is_named():
    with pytest.raises(ValueError, match="found a Linear, expected megatron-core's GPTModel or HybridModel"):
        held_layers(nn.Linear(2, 2))
