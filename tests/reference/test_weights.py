"""What the table says of each weight: against the file that `transformers` writes and megatron-core's own model.

The released files are in `test_full_size`, the names in `test_names`, the keys in `test_dist_checkpoint`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from bridge.model.build import build_model
from bridge.model.process_groups import model_parallel
from reference.checkpoint import parameter_count
from reference.config import ModelConfig, QuantizationConfig
from reference.model_class import ModelClass
from reference.names import find
from reference.quantization import is_quantized
from reference.weights import (
    DROP_IN,
    LAYER_NUMBERS,
    QK_NORMS,
    TABLE,
    Dialect,
    Layout,
    Row,
    Scope,
    Storage,
    instances,
    sizes,
)

SIZES = {
    "hidden_size": 40,
    "vocab_size": 67,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "rotary_dim": 4,
    "intermediate_size": 20,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 2,
    "num_local_experts": 5,
}
CONFIG = ModelConfig(**SIZES)


def row_of(name: str, dialect: Dialect) -> Row:
    key = find(name, dialect)
    assert key is not None, name
    return key.row


def test_every_size_is_another_number():
    """So that a shape in the wrong sizes shows."""
    assert len(set(sizes(CONFIG).values())) == len(sizes(CONFIG)) == 6


def test_shapes_are_those_of_the_file_that_transformers_writes(tmp_path):
    MiniMaxM2ForCausalLM(MiniMaxM2Config(**SIZES, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ours = {
        name: shape
        for row, layer, expert in instances(CONFIG)
        for name, shape in zip(row.format(Dialect.HF_DISK, layer, expert), row.shapes(CONFIG), strict=True)
    }
    assert ours == written
    assert parameter_count(CONFIG) == sum(torch.Size(shape).numel() for shape in written.values())


LOCAL = {ModelClass.GPT: Dialect.MEGATRON_LOCAL, ModelClass.HYBRID: Dialect.HYBRID_LOCAL}


class Megatron(NamedTuple):
    """megatron-core's model in bfloat16, and the dialect of its names."""

    model: nn.Module
    dialect: Dialect


@pytest.fixture(scope="module", params=ModelClass)
def megatron(request) -> Iterator[Megatron]:
    with model_parallel():
        model = build_model(CONFIG, model=request.param, backend="local", perform_initialization=False)
        yield Megatron(model, LOCAL[request.param])


def test_dtypes_are_those_of_a_megatron_core_model(megatron):
    state = {name: value.dtype for name, value in megatron.model.state_dict().items() if value is not None}
    assert {name: row_of(name, megatron.dialect).plain_dtype(torch.bfloat16) for name in state} == state
    assert set(state.values()) == {torch.bfloat16, torch.float32}


def test_what_is_trained_are_the_parameters_of_a_megatron_core_model(megatron):
    state = {name for name, value in megatron.model.state_dict().items() if value is not None}
    trained = {name for name, parameter in megatron.model.named_parameters() if parameter.requires_grad}
    assert {name for name in state if row_of(name, megatron.dialect).trained} == trained
    assert trained < state


def test_matrices_that_are_multiplied_with_activations_can_be_quantised():
    """All but the router's, whose product is float32; which of them are, the config says."""
    config = replace(CONFIG, quantization=QuantizationConfig(modules_to_not_convert=()))
    matrices = {
        name
        for row, layer, expert in instances(config)
        for name, shape in zip(row.format(Dialect.HF_DISK, layer, expert), row.shapes(config), strict=True)
        if len(shape) == 2 and "embed_tokens" not in name and ".gate." not in name
    }
    names = {name for row, *at in instances(config) for name in row.format(Dialect.HF_DISK, *at)}
    assert {name for name in names if is_quantized(name, config)} == matrices
    by_default = {name for name in names if is_quantized(name, replace(config, quantization=QuantizationConfig()))}
    assert matrices - by_default == {"lm_head.weight"}


def test_a_row_has_a_shape_for_each_tensor_and_one_name_in_megatron():
    for row in TABLE:
        assert len(row.axes) == len(row.names[Dialect.HF_DISK])
        assert len(row.axes) == {Layout.QKV: 3, Layout.GATE_UP: 2}.get(row.layout, 1)
        for dialect in Dialect:
            if dialect not in (Dialect.HF_DISK, Dialect.HF_MEMORY):
                assert len(row.names[dialect]) == 1


def test_a_drop_in_dialect_differs_in_the_two_norms_only():
    for drop_in, like in DROP_IN.items():
        differ = [row for row in TABLE if row.names[drop_in] != row.names[like]]
        assert [row.layout for row in differ] == list(QK_NORMS)
        for row in TABLE:
            assert row.layout_in(like) is row.layout
            assert row.layout_in(drop_in) is (Layout.REPLICATED if row in differ else row.layout)
    te = DROP_IN.keys() & {Dialect.MEGATRON_TE_DROP_IN}
    assert [row.names[dialect] for dialect in te for row in TABLE if row.layout in QK_NORMS] == [
        ("decoder.layers.{layer}.self_attention.q_layernorm.weight",),
        ("decoder.layers.{layer}.self_attention.k_layernorm.weight",),
    ]


def test_indices_of_names_follow_the_scope():
    """What a name counts; what it leaves out is stacked in one tensor. HybridModel counts each half of a layer."""
    counted = {
        dialect: {
            scope: {
                field
                for row in TABLE
                if row.scope is scope
                for name in row.names[dialect]
                for field in (*LAYER_NUMBERS, "expert")
                if f"{{{field}}}" in name
            }
            for scope in Scope
        }
        for dialect in Dialect
    }
    none, layer, both = set(), {"layer"}, {"layer", "expert"}
    expected = {
        Dialect.HF_DISK: (none, layer, layer, both),
        Dialect.HF_MEMORY: (none, layer, layer, layer),
        Dialect.MEGATRON_TE: (none, layer, layer, both),
        Dialect.HYBRID_TE: (none, {"attention"}, {"moe"}, {"moe", "expert"}),
        Dialect.MEGATRON_LOCAL: (none, layer, layer, both),
        Dialect.HYBRID_LOCAL: (none, {"attention"}, {"moe"}, {"moe", "expert"}),
        Dialect.TORCH_DIST: (none, none, none, none),
        Dialect.TORCH_DIST_LAYERS: (none, layer, layer, layer),
        Dialect.TORCH_DIST_HYBRID: (none, {"attention"}, {"moe"}, {"moe"}),
    }
    expected |= {drop_in: expected[like] for drop_in, like in DROP_IN.items()}
    scopes = (Scope.MODEL, Scope.ATTENTION, Scope.MOE, Scope.EXPERT)
    assert counted == {dialect: dict(zip(scopes, fields, strict=True)) for dialect, fields in expected.items()}


def test_only_the_router_is_float32_and_only_its_bias_is_not_trained():
    kept = [row.names[Dialect.HF_DISK] for row in TABLE if row.storage is Storage.FLOAT32]
    moe = "model.layers.{layer}.block_sparse_moe."
    assert kept == [(f"{moe}gate.weight",), (f"{moe}e_score_correction_bias",)]
    assert [row.names[Dialect.HF_DISK] for row in TABLE if not row.trained] == kept[1:]
