"""Names: against `transformers`' own model and file, megatron-core's own model, and a list written out by hand."""

import itertools
import re
from contextlib import contextmanager
from unittest.mock import patch

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from bridge.model.build import build_model
from bridge.model.process_groups import model_parallel
from reference.config import ModelConfig
from reference.fusion import merge_gate_up, split_gate_up, stack_experts, unstack_experts
from reference.names import all_names, find, parse, remap
from reference.parallelism import Parallelism
from reference.sharding import parameters
from reference.weights import LAYER_NUMBERS, TABLE, Dialect

DISK, MEMORY, TE, LOCAL = Dialect.HF_DISK, Dialect.HF_MEMORY, Dialect.MEGATRON_TE, Dialect.MEGATRON_LOCAL

SIZES = {
    "hidden_size": 16,
    "vocab_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rotary_dim": 2,
    "intermediate_size": 6,
    "num_experts_per_tok": 1,
}


def model(layers: int, experts: int) -> ModelConfig:
    return ModelConfig(**SIZES, num_hidden_layers=layers, num_local_experts=experts)


# ------------------------------------------------------------------------------------------------- transformers

HF_SIZES = [(1, 1), (2, 3), (11, 12)]  # 11 and 12: "10" and "11" sort before "2", and 1 begins 10


@pytest.fixture(scope="module", params=HF_SIZES, ids=lambda size: f"{size[0]}layers_{size[1]}experts")
def saved(request, tmp_path_factory) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Tensor]]:
    """A model's config, its state dict, and what `save_pretrained` writes; every number of the model is different."""
    config = model(*request.param)
    hf_config = MiniMaxM2Config(
        **SIZES,
        num_hidden_layers=config.num_hidden_layers,
        num_local_experts=config.num_local_experts,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf_model = MiniMaxM2ForCausalLM(hf_config)
    memory = hf_model.state_dict()
    first = 0
    for tensor in memory.values():
        tensor.copy_(torch.arange(first, first + tensor.numel()).view(tensor.shape))
        first += tensor.numel()
    assert first < 2**24  # float32 counts exactly up to here
    folder = tmp_path_factory.mktemp("saved")
    hf_model.save_pretrained(folder)
    return config, memory, load_file(folder / "model.safetensors")


def test_hf_names_are_those_of_transformers(saved):
    config, memory, disk = saved
    assert sorted(all_names(config, MEMORY)) == sorted(memory)
    assert sorted(all_names(config, DISK)) == sorted(disk)


def test_remap_and_layout_write_the_file_that_transformers_writes(saved):
    config, memory, disk = saved
    ours: dict[str, Tensor] = {}
    for name, parts in remap(disk, config, source=DISK, target=MEMORY).items():
        values = [memory[name]]
        if ".mlp.experts." in name:
            values = unstack_experts(memory[name])
        if name.endswith("gate_up_proj"):
            values = [half for fused in values for half in split_gate_up(fused)]
        ours |= zip(parts, values, strict=True)
    assert_same(ours, disk)


def test_remap_and_layout_read_the_file_as_transformers_holds_it(saved):
    config, memory, disk = saved
    ours: dict[str, Tensor] = {}
    for name, parts in remap(disk, config, source=DISK, target=MEMORY).items():
        values = [disk[part] for part in parts]
        if name.endswith("gate_up_proj"):
            values = [merge_gate_up(w1, w3) for w1, w3 in itertools.batched(values, 2)]
        ours[name] = stack_experts(values) if ".mlp.experts." in name else values[0]
    assert_same(ours, memory)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


# ------------------------------------------------------------------------------------------------- megatron-core


@pytest.mark.parametrize(("kind", "dialect"), [("gpt", LOCAL), ("hybrid", Dialect.HYBRID_LOCAL)])
def test_local_names_and_shapes_are_those_of_a_megatron_core_model(kind, dialect):
    config = model(2, 3)
    with model_parallel():
        megatron = build_model(config, model=kind, params_dtype=torch.float32, backend="local")
    theirs = {name: tuple(value.shape) for name, value in megatron.state_dict().items() if value is not None}
    assert sorted(all_names(config, dialect)) == sorted(theirs)
    assert {held.name: held.shape for held in parameters(config, Parallelism(), 0, dialect)} == theirs


TE_LAYER = [
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.qk_norm.q_weight",
    "self_attention.qk_norm.k_weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.router.expert_bias",
    "mlp.experts.linear_fc1.weight0",
    "mlp.experts.linear_fc1.weight1",
    "mlp.experts.linear_fc2.weight0",
    "mlp.experts.linear_fc2.weight1",
]
HYBRID = Dialect.HYBRID_TE
TE_NAMES = [
    "embedding.word_embeddings.weight",
    *("decoder.layers.0." + name for name in TE_LAYER),
    *("decoder.layers.1." + name for name in TE_LAYER),
    "decoder.final_layernorm.weight",
    "output_layer.weight",
]

# Disk names of layer 1, expert 1: what becomes of them in Megatron, TE spec and (where it differs) local spec.
_ATTENTION, _EXPERT = "model.layers.1.self_attn.", "model.layers.1.block_sparse_moe.experts.1."
_QKV = tuple(_ATTENTION + part + "_proj.weight" for part in "qkv")
MADE_OF = [
    (TE, "embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    (TE, "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", ("model.layers.1.input_layernorm.weight",)),
    (LOCAL, "decoder.layers.1.input_layernorm.weight", ("model.layers.1.input_layernorm.weight",)),
    (TE, "decoder.layers.1.self_attention.linear_qkv.weight", _QKV),
    (TE, "decoder.layers.1.self_attention.qk_norm.q_weight", (_ATTENTION + "q_norm.weight",)),
    (TE, "decoder.layers.1.self_attention.qk_norm.k_weight", (_ATTENTION + "k_norm.weight",)),
    (TE, "decoder.layers.1.self_attention.linear_proj.weight", (_ATTENTION + "o_proj.weight",)),
    (TE, "decoder.layers.1.pre_mlp_layernorm.weight", ("model.layers.1.post_attention_layernorm.weight",)),
    (TE, "decoder.layers.1.mlp.router.weight", ("model.layers.1.block_sparse_moe.gate.weight",)),
    (TE, "decoder.layers.1.mlp.router.expert_bias", ("model.layers.1.block_sparse_moe.e_score_correction_bias",)),
    (TE, "decoder.layers.1.mlp.experts.linear_fc1.weight1", (_EXPERT + "w1.weight", _EXPERT + "w3.weight")),
    (TE, "decoder.layers.1.mlp.experts.linear_fc2.weight1", (_EXPERT + "w2.weight",)),
    (
        LOCAL,
        "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight",
        (_EXPERT + "w1.weight", _EXPERT + "w3.weight"),
    ),
    (LOCAL, "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight", (_EXPERT + "w2.weight",)),
    (TE, "decoder.final_layernorm.weight", ("model.norm.weight",)),
    (TE, "output_layer.weight", ("lm_head.weight",)),
    (HYBRID, "decoder.layers.2.self_attention.linear_qkv.weight", _QKV),
    (HYBRID, "decoder.layers.3.pre_mlp_layernorm.weight", ("model.layers.1.post_attention_layernorm.weight",)),
    (HYBRID, "decoder.layers.3.mlp.experts.linear_fc2.weight1", (_EXPERT + "w2.weight",)),
    (HYBRID, "decoder.final_norm.weight", ("model.norm.weight",)),
]


def test_transformer_engine_names():
    assert all_names(model(2, 2), TE) == TE_NAMES


@pytest.mark.parametrize(("dialect", "name", "parts"), MADE_OF, ids=lambda value: value if type(value) is str else None)
def test_what_a_megatron_parameter_is_made_of(dialect, name, parts):
    config = model(2, 2)
    assert remap(all_names(config, DISK), config, source=DISK, target=dialect)[name] == parts


# ------------------------------------------------------------------------------------------------- both ways


@contextmanager
def types_unchecked():
    """A hundred times faster; the other tests have their types checked."""
    with patch.object(jaxtyping.config, "jaxtyping_disable", True):
        yield


SMALL = st.builds(model, st.integers(1, 12), st.integers(1, 12))
PAIRS = list(itertools.combinations_with_replacement(Dialect, 2))


def relation(made_of: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """(source, target) of every part."""
    return sorted((part, name) for name, parts in made_of.items() for part in parts)


@pytest.mark.parametrize(("a", "b"), PAIRS)
@settings(max_examples=10, deadline=None)
@given(config=SMALL, random=st.randoms(use_true_random=False))
@types_unchecked()
def test_remap_is_total_and_reversible(a, b, config, random):
    names_a, names_b = all_names(config, a), all_names(config, b)
    shuffled = random.sample(names_a, len(names_a))
    there = remap(shuffled, config, source=a, target=b)
    back = remap(names_b, config, source=b, target=a)
    assert relation(there) == sorted((name, part) for part, name in relation(back))
    assert {part for parts in there.values() for part in parts} == set(names_a)
    assert list(there) == names_b
    assert list(there.items()) == list(remap(names_a, config, source=a, target=b).items())


def test_a_state_dict_may_stand_for_its_names():
    config = model(1, 1)
    weights = dict.fromkeys(all_names(config, DISK), torch.zeros(2))
    assert remap(weights, config, source=DISK, target=TE) == remap(list(weights), config, source=DISK, target=TE)


def test_a_fused_tensor_lists_its_parts_in_the_order_they_are_stacked():
    config = model(1, 11)
    parts = remap(all_names(config, DISK), config, source=DISK, target=MEMORY)[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]
    expert = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    assert parts == tuple(expert.format(e, part) for e in range(11) for part in ("w1", "w3"))


TEMPLATES = [(dialect, name) for row in TABLE for dialect in Dialect for name in row.names[dialect] if "{" in name]
INDICES = st.one_of(st.integers(0, 300).map(str), st.text("0123456789#٣-+_. \n", max_size=4))


@settings(max_examples=50, deadline=None)
@given(template=st.sampled_from(TEMPLATES), layer=INDICES, expert=INDICES)
def test_only_the_name_that_the_table_writes_is_found(template, layer, expert):
    """Leading zeros, signs, other alphabets' digits, an odd layer of attention: None, or else the key of that name."""
    dialect, text = template
    numbers = dict.fromkeys(LAYER_NUMBERS, layer) | {"expert": expert}
    name = text.format(**numbers)
    key = find(name, dialect)
    assert key is None or key.row.format(dialect, key.layer, key.expert)[key.part] == name
    written = {field: value for field, value in numbers.items() if f"{{{field}}}" in text}
    if all(value.isdecimal() and value.isascii() and str(int(value)) == value for value in written.values()):
        steps = LAYER_NUMBERS | {"expert": (1, 0)}
        counted = {field: divmod(int(value) - steps[field][1], steps[field][0]) for field, value in written.items()}
        assert (key is None) == any(rest for _, rest in counted.values())
        if key is not None:
            found = {field: key.expert if field == "expert" else key.layer for field in written}
            assert found == {field: index for field, (index, _) in counted.items()}


# ------------------------------------------------------------------------------------------------- errors

_RANGE = "the model has layers 0 to 1 and experts 0 to 2"
_UNKNOWN = "not the name of a MiniMax-M2 weight in dialect hf_disk"
BAD = {  # of two layers and three experts
    "unknown": ("model.layers.0.self_attn.rotary_emb.inv_freq", _UNKNOWN),
    "scale": ("model.layers.0.self_attn.q_proj.weight_scale_inv", _UNKNOWN),
    "other dialect": ("decoder.layers.0.mlp.router.weight", _UNKNOWN),
    "empty": ("", _UNKNOWN),
    "layer out of range": ("model.layers.2.input_layernorm.weight", _RANGE),
    "expert out of range": ("model.layers.1.block_sparse_moe.experts.3.w2.weight", _RANGE),
    "leading zero in layer": ("model.layers.01.input_layernorm.weight", _UNKNOWN),
    "leading zero in expert": ("model.layers.1.block_sparse_moe.experts.00.w2.weight", _UNKNOWN),
    "negative layer": ("model.layers.-1.input_layernorm.weight", _UNKNOWN),
    "not an index": ("model.layers.#.input_layernorm.weight", _UNKNOWN),
    "another alphabet's digit": ("model.layers.\u0661.input_layernorm.weight", _UNKNOWN),
}


@pytest.mark.parametrize(("name", "complaint"), BAD.values(), ids=BAD)
def test_a_name_that_is_not_the_models_is_named(name, complaint):
    config = model(2, 3)
    message = re.escape(f"{name}: {complaint}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse(name, DISK, config)
    with pytest.raises(ValueError, match=f"^{message}$"):
        remap([*all_names(config, DISK), name], config, source=DISK, target=TE)


MISSING = {
    "model.layers.1.self_attn.k_proj.weight": "decoder.layers.1.self_attention.linear_qkv.weight",
    "model.layers.0.block_sparse_moe.experts.2.w3.weight": "decoder.layers.0.mlp.experts.linear_fc1.weight2",
    "lm_head.weight": "output_layer.weight",
}


@pytest.mark.parametrize(("name", "needed_for"), MISSING.items())
def test_a_missing_or_repeated_name_is_named(name, needed_for):
    config = model(2, 3)
    names = all_names(config, DISK)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: given 2 times, expected once')}$"):
        remap([*names, name], config, source=DISK, target=TE)
    names.remove(name)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: missing; the model needs it for {needed_for}')}$"):
        remap(names, config, source=DISK, target=TE)
