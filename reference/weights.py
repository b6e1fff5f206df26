"""The weights of MiniMax-M2, one row for each kind: its shapes, how it is stored, and its name in every dialect.

Everything that the project knows about one kind of weight stands in its row of `TABLE`; the rest of this package looks
it up there. `{layer}` and `{expert}` in a name count over the whole model, from 0; a Megatron rank numbers its own
from 0, which `reference.sharding` takes care of. `HybridModel` counts attention and experts as a layer each: its layer
2i is the attention of layer i, `{attention}` in a name, and 2i + 1 the experts of layer i, `{moe}`.

A new dialect is a member of `Dialect`, a line of `_PREFIXES` and a column of `TABLE`; those of `DROP_IN` follow from
others.

Sources: the released files' headers; `transformers` conversion_mapping (minimax_m2); megatron-core gpt_layer_specs and
HybridStack, and for the keys TransformerBlock.sharded_state_dict, HybridStack.sharded_state_dict, TEGroupedLinear,
SequentialMLP.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, groupby

import torch

from reference.config import ModelConfig
from reference.model_class import ModelClass


class Dialect(StrEnum):
    """A naming scheme for the weights of one model."""

    HF_DISK = "hf_disk"  # the released safetensors files; also what transformers writes
    HF_MEMORY = "hf_memory"  # `MiniMaxM2ForCausalLM.state_dict()` in transformers 5: experts stacked
    MEGATRON_TE = "megatron_te"  # a megatron-core `GPTModel` built from the Transformer Engine layer spec
    HYBRID_TE = "hybrid_te"  # a megatron-core `HybridModel` of the pattern `*E` for each layer, Transformer Engine spec
    MEGATRON_LOCAL = "megatron_local"  # a `GPTModel` from the local layer spec
    HYBRID_LOCAL = "hybrid_local"  # a `HybridModel` from the local layer spec
    TORCH_DIST = "torch_dist"  # keys of a `GPTModel`'s distributed checkpoint: all layers, all experts stacked
    TORCH_DIST_LAYERS = "torch_dist_layers"  # the same with `non_homogeneous_layers`: a key for each layer
    TORCH_DIST_HYBRID = "torch_dist_hybrid"  # keys of a `HybridModel`'s: always one for each of its layers
    MEGATRON_TE_DROP_IN = "megatron_te_drop_in"  # MEGATRON_TE, but with the two norms in megatron-core's own attention
    HYBRID_TE_DROP_IN = "hybrid_te_drop_in"  # HYBRID_TE so
    MEGATRON_LOCAL_DROP_IN = "megatron_local_drop_in"  # MEGATRON_LOCAL so
    HYBRID_LOCAL_DROP_IN = "hybrid_local_drop_in"  # HYBRID_LOCAL so


# Dialects of models whose attention is megatron-core's own, with `bridge.FullDimQNorm` and `FullDimKNorm` in its norm
# slots, and what they are otherwise. The two weights are called there what distributed checkpoints call them, and each
# tensor-parallel rank has them whole.
DROP_IN: dict[Dialect, Dialect] = {
    Dialect.MEGATRON_TE_DROP_IN: Dialect.MEGATRON_TE,
    Dialect.HYBRID_TE_DROP_IN: Dialect.HYBRID_TE,
    Dialect.MEGATRON_LOCAL_DROP_IN: Dialect.MEGATRON_LOCAL,
    Dialect.HYBRID_LOCAL_DROP_IN: Dialect.HYBRID_LOCAL,
}

# The dialects of a model in memory, by its class, and of its distributed checkpoint; the first is what is written.
MODEL_DIALECTS: dict[ModelClass, tuple[Dialect, ...]] = {
    ModelClass.GPT: (
        Dialect.MEGATRON_TE,
        Dialect.MEGATRON_LOCAL,
        Dialect.MEGATRON_TE_DROP_IN,
        Dialect.MEGATRON_LOCAL_DROP_IN,
    ),
    ModelClass.HYBRID: (
        Dialect.HYBRID_TE,
        Dialect.HYBRID_LOCAL,
        Dialect.HYBRID_TE_DROP_IN,
        Dialect.HYBRID_LOCAL_DROP_IN,
    ),
}
CHECKPOINT_DIALECTS: dict[ModelClass, tuple[Dialect, ...]] = {
    ModelClass.GPT: (Dialect.TORCH_DIST, Dialect.TORCH_DIST_LAYERS),
    ModelClass.HYBRID: (Dialect.TORCH_DIST_HYBRID,),
}


class Scope(StrEnum):
    """How often a kind of weight occurs, and in which half of a layer."""

    MODEL = "model"  # once
    ATTENTION = "attention"  # once a layer, in its first half: attention and the norm before it
    MOE = "moe"  # once a layer, in its second half: the mixture of experts and the norm before it
    EXPERT = "expert"  # once for each expert of each layer


class Layout(StrEnum):
    """How a Megatron parameter is put together from its on-disk tensors, and how it is sharded."""

    REPLICATED = "replicated"
    VOCABULARY = "vocabulary"  # rows over tensor-parallel ranks, filled up with zero rows
    QKV = "qkv"  # per key/value group: its query heads, its key head, its value head; rows over tensor-parallel ranks
    QUERY_HEADS = "query_heads"  # a vector over all query heads
    KEY_HEADS = "key_heads"  # a vector over all key/value heads, replicated when there are fewer heads than ranks
    COLUMNS = "columns"  # columns over tensor-parallel ranks
    GATE_UP = "gate_up"  # each expert-tensor-parallel rank holds its rows of w1 over its rows of w3
    EXPERT_COLUMNS = "expert_columns"  # columns over expert-tensor-parallel ranks


QK_NORMS = (Layout.QUERY_HEADS, Layout.KEY_HEADS)


class Storage(StrEnum):
    """In which dtypes a kind of weight is kept."""

    MODEL_DTYPE = "model_dtype"  # the model's dtype: bfloat16 in the released files
    QUANTIZABLE = "quantizable"  # float8 with scales in quantised files that do not exclude it, else the model's dtype
    FLOAT32 = "float32"  # float32 in every file and model


@dataclass(frozen=True, eq=False)
class Row:
    """One kind of weight.

    Args:
        scope: how often it occurs.
        layout: how its Megatron parameter is put together and sharded (`layout_in` for each dialect).
        storage: in which dtypes it is kept.
        trained: whether it has a gradient.
        axes: the axes of each of its on-disk tensors, as names of sizes (`sizes`).
        names: its name in each dialect. Several names are the parts that other dialects fuse into one tensor, in
            that order: q, k, v into `linear_qkv`; w1, w3 into `linear_fc1`.
    """

    scope: Scope
    layout: Layout
    storage: Storage
    trained: bool
    axes: tuple[tuple[str, ...], ...]
    names: dict[Dialect, tuple[str, ...]]

    def format(self, dialect: Dialect, layer: int, expert: int) -> tuple[str, ...]:
        """The names in `dialect` for one layer and expert."""
        numbers = {field: step * layer + first for field, (step, first) in LAYER_NUMBERS.items()}
        return tuple(template.format(expert=expert, **numbers) for template in self.names[dialect])

    def layout_in(self, dialect: Dialect) -> Layout:
        """How its parameter is put together and sharded in a model of `dialect`: a drop-in norm is whole on each rank."""
        return Layout.REPLICATED if dialect in DROP_IN and self.layout in QK_NORMS else self.layout

    def shapes(self, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """The shape of each on-disk tensor, in the order of their names."""
        of = sizes(config)
        return tuple(tuple(of[axis] for axis in axes) for axes in self.axes)

    def plain_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype of its values where they are not quantised: float32 for the router, else `model_dtype`."""
        return torch.float32 if self.storage is Storage.FLOAT32 else model_dtype


def sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes that `Row.axes` names."""
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "query": config.num_attention_heads * config.head_dim,
        "key": config.num_key_value_heads * config.head_dim,
        "experts": config.num_local_experts,
        "width": config.intermediate_size,
    }


# What names call layer i: (step, first) means step x i + first.
LAYER_NUMBERS: dict[str, tuple[int, int]] = {"layer": (1, 0), "attention": (2, 0), "moe": (2, 1)}

# fmt: off
# What stands before every name of a dialect: of the model, of a layer's attention, of its mixture of experts, of an expert.
_LAYER, _ATTENTION, _MOE = "decoder.layers.{layer}.", "decoder.layers.{attention}.", "decoder.layers.{moe}."
_PREFIXES: dict[Dialect, tuple[str, str, str, str]] = {
    Dialect.HF_DISK:            ("", "model.layers.{layer}.", "model.layers.{layer}.", "model.layers.{layer}.block_sparse_moe.experts.{expert}."),
    Dialect.HF_MEMORY:          ("", "model.layers.{layer}.", "model.layers.{layer}.", "model.layers.{layer}.mlp.experts."),
    Dialect.MEGATRON_TE:        ("", _LAYER,                  _LAYER,                  _LAYER + "mlp.experts."),
    Dialect.HYBRID_TE:          ("", _ATTENTION,              _MOE,                    _MOE + "mlp.experts."),
    Dialect.MEGATRON_LOCAL:     ("", _LAYER,                  _LAYER,                  _LAYER + "mlp.experts.local_experts.{expert}."),
    Dialect.HYBRID_LOCAL:       ("", _ATTENTION,              _MOE,                    _MOE + "mlp.experts.local_experts.{expert}."),
    Dialect.TORCH_DIST:         ("", "decoder.layers.",       "decoder.layers.",       "decoder.layers.mlp.experts.experts."),
    Dialect.TORCH_DIST_LAYERS:  ("", _LAYER,                  _LAYER,                  _LAYER + "mlp.experts.experts."),
    Dialect.TORCH_DIST_HYBRID:  ("", _ATTENTION,              _MOE,                    _MOE + "mlp.experts.experts."),
}
# fmt: on
_COLUMNS = tuple(_PREFIXES)  # of the table, in this order
_PREFIXES |= {dialect: _PREFIXES[like] for dialect, like in DROP_IN.items()}


def _row(scope: str, layout: str, storage: str, axes: str, *cells: str, trained: bool = True) -> Row:
    """A row of the table, names in the order of `_COLUMNS`.

    "=" repeats the name to its left. A row of several on-disk tensors has their shapes apart by commas, their names by
    blanks.
    """
    columns = dict(zip(_COLUMNS, accumulate(cells, lambda left, cell: left if cell == "=" else cell), strict=True))
    checkpoint_name = Layout(layout) in QK_NORMS
    columns |= {drop_in: columns[Dialect.TORCH_DIST if checkpoint_name else like] for drop_in, like in DROP_IN.items()}
    names = {}
    for dialect, cell in columns.items():
        prefix = dict(zip(Scope, _PREFIXES[dialect], strict=True))[Scope(scope)]
        names[dialect] = tuple(prefix + name for name in cell.split())
    shapes = tuple(tuple(shape.split()) for shape in axes.split(","))
    return Row(Scope(scope), Layout(layout), Storage(storage), trained, shapes, names)


_QKV = "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight"
_BIAS = "e_score_correction_bias"

# fmt: off
TABLE: tuple[Row, ...] = (
    #    scope        layout            storage        shapes on disk                          HF on disk                         HF in memory       GPTModel, TE spec                              HybridModel, TE              GPTModel, local                   HybridModel, local           GPTModel, torch_dist                           by layer  HybridModel, torch_dist
    _row("model",     "vocabulary",     "model_dtype", "vocab hidden",                         "model.embed_tokens.weight",       "=",               "embedding.word_embeddings.weight",            "=",                         "=",                              "=",                         "embedding.word_embeddings.weight",            "=",      "="),
    _row("attention", "replicated",     "model_dtype", "hidden",                               "input_layernorm.weight",          "=",               "self_attention.linear_qkv.layer_norm_weight", "=",                         "input_layernorm.weight",         "=",                         "self_attention.linear_qkv.layer_norm_weight", "=",      "="),
    _row("attention", "qkv",            "quantizable", "query hidden, key hidden, key hidden", _QKV,                              "=",               "self_attention.linear_qkv.weight",            "=",                         "=",                              "=",                         "self_attention.linear_qkv.weight",            "=",      "="),
    _row("attention", "query_heads",    "model_dtype", "query",                                "self_attn.q_norm.weight",         "=",               "self_attention.qk_norm.q_weight",             "=",                         "=",                              "=",                         "self_attention.q_layernorm.weight",           "=",      "="),
    _row("attention", "key_heads",      "model_dtype", "key",                                  "self_attn.k_norm.weight",         "=",               "self_attention.qk_norm.k_weight",             "=",                         "=",                              "=",                         "self_attention.k_layernorm.weight",           "=",      "="),
    _row("attention", "columns",        "quantizable", "hidden query",                         "self_attn.o_proj.weight",         "=",               "self_attention.linear_proj.weight",           "=",                         "=",                              "=",                         "self_attention.linear_proj.weight",           "=",      "="),
    _row("moe",       "replicated",     "model_dtype", "hidden",                               "post_attention_layernorm.weight", "=",               "pre_mlp_layernorm.weight",                    "=",                         "=",                              "=",                         "pre_mlp_layernorm.weight",                    "=",      "="),
    _row("moe",       "replicated",     "float32",     "experts hidden",                       "block_sparse_moe.gate.weight",    "mlp.gate.weight", "mlp.router.weight",                           "=",                         "=",                              "=",                         "mlp.router.weight",                           "=",      "="),
    _row("moe",       "replicated",     "float32",     "experts",                              f"block_sparse_moe.{_BIAS}",       f"mlp.{_BIAS}",    "mlp.router.expert_bias",                      "=",                         "=",                              "=",                         "mlp.router.expert_bias",                      "=",      "=", trained=False),
    _row("expert",    "gate_up",        "quantizable", "width hidden, width hidden",           "w1.weight w3.weight",             "gate_up_proj",    "linear_fc1.weight{expert}",                   "=",                         "linear_fc1.weight",              "=",                         "linear_fc1.weight",                           "=",      "="),
    _row("expert",    "expert_columns", "quantizable", "hidden width",                         "w2.weight",                       "down_proj",       "linear_fc2.weight{expert}",                   "=",                         "linear_fc2.weight",              "=",                         "linear_fc2.weight",                           "=",      "="),
    _row("model",     "replicated",     "model_dtype", "hidden",                               "model.norm.weight",               "=",               "decoder.final_layernorm.weight",              "decoder.final_norm.weight", "decoder.final_layernorm.weight", "decoder.final_norm.weight", "decoder.final_layernorm.weight",              "=",      "decoder.final_norm.weight"),
    _row("model",     "vocabulary",     "quantizable", "vocab hidden",                         "lm_head.weight",                  "=",               "output_layer.weight",                         "=",                         "=",                              "=",                         "output_layer.weight",                         "=",      "="),
)
# fmt: on


def instances(config: ModelConfig) -> Iterator[tuple[Row, int, int]]:
    """Every (row, layer, expert) of a model, in the order of TABLE and layer by layer; 0 where there is no such index."""
    for repeats, group in groupby(TABLE, key=lambda row: row.scope is not Scope.MODEL):
        rows = list(group)
        for layer in range(config.num_hidden_layers if repeats else 1):
            for row in rows:
                for expert in range(config.num_local_experts if row.scope is Scope.EXPERT else 1):
                    yield row, layer, expert
