"""Keys, shapes and places in a distributed checkpoint: those of megatron-core's own `sharded_state_dict`.

Here the model has the local layer spec. Transformer Engine's needs a GPU; what a checkpoint saved from it holds was
looked up on one (H200, megatron-core 0.19.2, Transformer Engine 2.20) and is written down below.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from support.checkpoints import EDGY_CONFIG

from bridge.huggingface.random_checkpoint import SMALL_CONFIG
from bridge.model.build import build_model
from bridge.model.config import gpt_model_arguments, transformer_config
from bridge.model.process_groups import model_parallel
from reference.checkpoint import parameter_count
from reference.config import ModelConfig
from reference.dist_checkpoint import Entry, dialect_of, entries
from reference.model_class import ModelClass
from reference.names import all_names
from reference.parallelism import Parallelism
from reference.sharding import parameters
from reference.weights import Dialect, Layout, instances

EDGY = ModelConfig.from_hf(EDGY_CONFIG)
VOCAB_DIVISOR = 128  # 131 tokens, 256 rows


class Place(NamedTuple):
    """A parameter in a checkpoint: its key, that tensor's shape, and where the parameter begins and ends in it."""

    key: str
    whole: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]


def place_of(sharded: ShardedTensor | ShardedTensorFactory) -> Place:
    """A factory, as gated experts have, makes several tensors: one below the other."""
    parts = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
    assert len({(part.key, part.global_shape) for part in parts}) == 1
    spans = []
    for part in parts:
        shape = (1,) * part.prepend_axis_num + part.local_shape
        stop = tuple(offset + size for offset, size in zip(part.global_offset, shape, strict=True))
        spans.append((part.global_offset, stop))
    for (_, stop), (start, _) in pairwise(spans):
        assert stop[-2] == start[-2], "no gap between the rows"
    return Place(parts[0].key, parts[0].global_shape, spans[0][0], spans[-1][1])


def place(entry: Entry) -> Place:
    start = (*entry.index, *(0 for _ in entry.parameter.shape))
    stop = (*(i + 1 for i in entry.index), *entry.parameter.shape)
    return Place(entry.key, entry.shape, start, stop)


@pytest.fixture(scope="module")
def megatron() -> dict[str, dict[str, object]]:
    """What the models say of themselves: `GPTModel` with a key for all layers and with one for each, `HybridModel`."""
    with model_parallel():
        gpt, hybrid = (
            build_model(EDGY, model=kind, backend="local", vocab_divisor=VOCAB_DIVISOR, perform_initialization=False)
            for kind in ModelClass
        )
        return {
            Dialect.TORCH_DIST: gpt.sharded_state_dict(),
            Dialect.TORCH_DIST_LAYERS: gpt.sharded_state_dict(metadata={"non_homogeneous_layers": True}),
            Dialect.TORCH_DIST_HYBRID: hybrid.sharded_state_dict(),
        }


# Of each dialect of keys, that of the model's names, and where expert 4 of layer 1 lies.
KINDS = {
    Dialect.TORCH_DIST: (Dialect.MEGATRON_LOCAL, "decoder.layers.1.mlp.", (1, 4)),
    Dialect.TORCH_DIST_LAYERS: (Dialect.MEGATRON_LOCAL, "decoder.layers.1.mlp.", (4,)),
    Dialect.TORCH_DIST_HYBRID: (Dialect.HYBRID_LOCAL, "decoder.layers.3.mlp.", (4,)),
}


@pytest.mark.parametrize("dialect", KINDS)
def test_every_parameter_lies_where_megatron_puts_it(megatron: dict, dialect: Dialect) -> None:
    named, prefix, middle = KINDS[dialect]
    found = list(entries(EDGY, vocab_divisor=VOCAB_DIVISOR, dialect=dialect))
    layout = Parallelism(vocab_divisor=VOCAB_DIVISOR)
    names = [parameter.name for parameter in parameters(EDGY, layout, 0, named)]
    ours = {name: place(entry) for name, entry in zip(names, found, strict=True)}
    theirs = {name: place_of(v) for name, v in megatron[dialect].items() if "_extra_state" not in name}
    assert ours == theirs
    layered = ours[f"{prefix}experts.local_experts.4.linear_fc2.weight"]
    assert layered.start == (*middle, 0, 0), "the comparison is of something"


@pytest.mark.parametrize("dialect", KINDS)
def test_the_keys_are_those_of_the_table(megatron: dict, dialect: Dialect) -> None:
    theirs = {place_of(v).key for name, v in megatron[dialect].items() if "_extra_state" not in name}
    assert set(all_names(EDGY, dialect)) == theirs
    assert dialect_of(theirs) is dialect


@pytest.mark.parametrize("dialect", KINDS)
def test_a_damaged_checkpoint_is_still_of_its_dialect(dialect: Dialect) -> None:
    """So that the message names what is missing, and not every key."""
    keys = {key for key in all_names(EDGY, dialect) if not key.endswith(("fc1.weight", "norm.weight"))}
    assert dialect_of(keys) is dialect


@pytest.fixture(scope="module")
def unchanged_attention() -> dict[Dialect, set[str]]:
    """The keys of attention in a model of megatron-core's own layer, which has none of our modules."""
    with model_parallel():
        config = transformer_config(EDGY, params_dtype=torch.bfloat16, backend="local", qk_layernorm=True)
        spec = get_gpt_layer_local_spec(
            num_experts=EDGY.num_local_experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
        )
        model = GPTModel(config=config, transformer_layer_spec=spec, **gpt_model_arguments(EDGY))
        metadata = {Dialect.TORCH_DIST: None, Dialect.TORCH_DIST_LAYERS: {"non_homogeneous_layers": True}}
        return {
            dialect: {v.key for name, v in model.sharded_state_dict(metadata=m).items() if is_of_attention(name)}
            for dialect, m in metadata.items()
        }


def is_of_attention(name: str) -> bool:
    return "self_attention." in name and "_extra_state" not in name


@pytest.mark.parametrize("dialect", [Dialect.TORCH_DIST, Dialect.TORCH_DIST_LAYERS])
def test_the_norms_over_all_heads_have_the_keys_of_megatrons_own_norms(
    unchanged_attention: dict[Dialect, set[str]], dialect: Dialect
) -> None:
    """Our attention takes its keys from the table, so that it is no oracle for them."""
    assert unchanged_attention[dialect] < set(all_names(EDGY, dialect))
    for layout, end in ((Layout.QUERY_HEADS, "q_layernorm.weight"), (Layout.KEY_HEADS, "k_layernorm.weight")):
        theirs = {key for key in unchanged_attention[dialect] if key.endswith(f".{end}")}
        ours = {key for row, *at in instances(EDGY) if row.layout is layout for key in row.format(dialect, *at)}
        assert ours == theirs != set()


def test_entries_hold_every_weight_of_the_checkpoint_once() -> None:
    sources = [source for entry in entries(EDGY) for source in entry.parameter.sources]
    assert sources == all_names(EDGY, Dialect.HF_DISK)
    sizes = {entry.key: entry.shape for entry in entries(EDGY)}
    assert sum(map(math.prod, sizes.values())) == parameter_count(EDGY)


# key: shape; as saved by megatron-core from the Transformer Engine spec, 2 layers and 4 experts of SMALL_CONFIG.
SEEN_WITH_TRANSFORMER_ENGINE = {
    "embedding.word_embeddings.weight": (256, 384),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 384),
    "decoder.layers.self_attention.linear_qkv.weight": (2, 1024, 384),
    "decoder.layers.self_attention.q_layernorm.weight": (2, 768),
    "decoder.layers.self_attention.k_layernorm.weight": (2, 128),
    "decoder.layers.self_attention.linear_proj.weight": (2, 384, 768),
    "decoder.layers.pre_mlp_layernorm.weight": (2, 384),
    "decoder.layers.mlp.router.weight": (2, 4, 384),
    "decoder.layers.mlp.router.expert_bias": (2, 4),
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": (2, 4, 512, 384),
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": (2, 4, 384, 256),
    "decoder.final_layernorm.weight": (384,),
    "output_layer.weight": (256, 384),
}


def test_the_keys_of_transformer_engine_are_the_same() -> None:
    sizes = {"num_hidden_layers": 2, "num_local_experts": 4, "vocab_size": 256}
    config = ModelConfig.from_hf(SMALL_CONFIG | sizes)
    assert {entry.key: entry.shape for entry in entries(config)} == SEEN_WITH_TRANSFORMER_ENGINE
