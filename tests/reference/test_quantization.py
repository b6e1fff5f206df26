"""The rule for which weights are written as float8, against `transformers`' own on the names that it sees."""

from dataclasses import replace

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from reference.config import ModelConfig, QuantizationConfig
from reference.names import all_names
from reference.quantization import is_excluded, is_quantized, quantized_names
from reference.weights import Dialect

SIZES = ModelConfig(
    rotary_dim=24,
    num_hidden_layers=12,
    hidden_size=200,
    vocab_size=50,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=50,
    intermediate_size=130,
    num_local_experts=11,
    num_experts_per_tok=1,
)
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3", "lm_head")


def with_list(*modules: str) -> ModelConfig:
    return replace(SIZES, quantization=QuantizationConfig(modules_to_not_convert=modules))


def modules_of(name: str) -> set[str]:
    """The module of a weight in the file format and in `transformers`' memory, by hand."""
    on_disk = name.removesuffix(".weight")
    in_memory = on_disk.replace(".block_sparse_moe.", ".mlp.")
    return {on_disk, in_memory.partition(".experts.")[0] + ".experts" if ".experts." in in_memory else in_memory}


SPELLINGS = {
    "none": (),
    "released": ("gate", "e_score_correction_bias", "lm_head"),
    "without lm_head": ("gate", "e_score_correction_bias"),
    "ends": ("o_proj", "w2"),
    "ends of components": ("proj", "head", "_proj"),
    "longer ends": ("self_attn.q_proj", "experts.1.w1", "mlp.gate"),
    "a layer": ("model.layers.1", "lm_head"),
    "a layer with a dot": ("model.layers.1.",),
    "parts of a layer": ("model.layers.1.self_attn", "model.layers.10.block_sparse_moe.experts.1.w2"),
    "parts of components": ("model.layers.1.self", "model.lay", "model.layers.10.block_sparse_moe.experts.1.w"),
    "expressions": (r"model\.layers\.(1|3|11)\..*", r".*\.v_proj"),
    "stars": ("model.layers.*", ),
    "the end of an expression": (r"model.layers.\d.self_attn.k_proj$",),
    "in memory": ("model.layers.2.mlp", "model.layers.3.mlp.experts", "model.layers.4.mlp.gate"),
    "in memory, all": ("mlp.experts",),
    "in the file": ("model.layers.2.block_sparse_moe", "block_sparse_moe.experts"),
    "everything": (".*",),
    "embedding and norms": ("model.embed_tokens", "model.norm", "input_layernorm"),
    "alternatives": ("q_proj|k_proj", "lm_head|model.layers.5"),
    "prefix of another tool": ("re:.*gate.*", "language_model.lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("modules", SPELLINGS.values(), ids=SPELLINGS)
def test_names_are_matched_as_in_transformers(modules):
    config = with_list(*modules)
    expected = {
        name
        for name in all_names(config, Dialect.HF_DISK)
        if name.split(".")[-2] in MATRICES
        and all(should_convert_module(module, list(modules)) for module in modules_of(name))
    }
    assert quantized_names(config) == expected
    assert {name for name in all_names(config, Dialect.HF_DISK) if is_quantized(name, config)} == expected


@pytest.mark.parametrize(
    ("modules", "count"),
    [
        ((), 12 * (4 + 33) + 1),
        (("gate", "e_score_correction_bias", "lm_head"), 12 * 37),
        (("o_proj",), 12 * 36 + 1),
        (("model.layers.1",), 11 * 37 + 1),
        (("model.layers.1.self_attn", "lm_head"), 12 * 37 - 4),
        (("model.layers.3.mlp.experts",), 12 * 37 - 33 + 1),
        ((r"model\.layers\.\d\..*",), 2 * 37 + 1),
        (("",), 0),
    ],
)
def test_so_many_are_quantised(modules, count):
    assert len(quantized_names(with_list(*modules))) == count


@pytest.mark.parametrize(
    "module", ["model.layers.1", "model.layers.11.self_attn.q_proj", "lm_head", "a.b.gate_proj", ""]
)
@pytest.mark.parametrize(
    "pattern", ["model.layers.1", "layers.1", "gate", "lm_head", "q_proj", ".", "model.*", "a.b", "a|lm", "x", "(a.b)"]
)
def test_one_pattern_against_one_module(module, pattern):
    assert is_excluded(module, (pattern,)) != should_convert_module(module, [pattern])


@pytest.mark.parametrize("pattern", ["*.gate", "(", "model.layers.[0-", "a{2,1}", "**", "?P<x"])
def test_what_is_no_expression_is_refused_by_name(pattern):
    with pytest.raises(ValueError, match=r"modules_to_not_convert: .* is not a regular expression") as caught:
        quantized_names(with_list("lm_head", pattern))
    assert repr(pattern) in str(caught.value)


def test_without_a_section_nothing_is_quantised():
    assert quantized_names(SIZES) == frozenset()
