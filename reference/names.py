"""What every weight is called in the four places it can live, as one table.

    HF_DISK         the released safetensors files; also what transformers writes
    HF_MEMORY       `MiniMaxM2ForCausalLM.state_dict()` in transformers 5: experts stacked
    MEGATRON_TE     a megatron-core `GPTModel` built from the Transformer Engine layer spec
    MEGATRON_LOCAL  the same from the local layer spec

A row is one kind of weight. Where a cell lists several names, they are the parts that the other dialects fuse into one
tensor, in that order: q, k, v into `linear_qkv`; w1, w3 into `linear_fc1`. `{layer}` and `{expert}` count over the whole model;
a Megatron rank numbers its own from 0, which `reference.sharding` takes care of. Scales of quantised tensors are
`<name>_scale_inv` on disk and are not named here (`reference.checkpoint`).

Sources: `transformers` conversion_mapping (minimax_m2); megatron-core gpt_layer_specs.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

from reference.config import ModelConfig


class Dialect(StrEnum):
    """A naming scheme for the weights of one model."""

    HF_DISK = "hf_disk"
    HF_MEMORY = "hf_memory"
    MEGATRON_TE = "megatron_te"
    MEGATRON_LOCAL = "megatron_local"


class Layout(StrEnum):
    """How a Megatron parameter is put together from its parts, and along what it is sharded."""

    REPLICATED = "replicated"
    VOCABULARY = "vocabulary"  # rows over tensor-parallel ranks, filled up with zero rows
    QKV = "qkv"  # per key/value group: its query heads, its key head, its value head; rows over tensor-parallel ranks
    QUERY_HEADS = "query_heads"  # a vector over all query heads
    KEY_HEADS = "key_heads"  # a vector over all key/value heads, replicated when there are fewer heads than ranks
    COLUMNS = "columns"  # columns over tensor-parallel ranks
    GATE_UP = "gate_up"  # each expert-tensor-parallel rank holds its rows of w1 over its rows of w3
    EXPERT_COLUMNS = "expert_columns"  # columns over expert-tensor-parallel ranks


class Scope(StrEnum):
    """How often a row occurs: once, once a layer, once an expert of each layer."""

    MODEL = "model"
    LAYER = "layer"
    EXPERT = "expert"


@dataclass(frozen=True, eq=False)
class Row:
    """One kind of weight: its layout, and its name or parts in each dialect."""

    scope: Scope
    layout: Layout
    names: dict[Dialect, tuple[str, ...]]

    def format(self, dialect: Dialect, layer: int, expert: int) -> tuple[str, ...]:
        """The names in `dialect` for one layer and expert."""
        return tuple(template.format(layer=layer, expert=expert) for template in self.names[dialect])


# What stands before every name of a scope, in the order of Dialect.
_PREFIXES: dict[Scope, tuple[str, str, str, str]] = {
    Scope.MODEL: ("", "", "", ""),
    Scope.LAYER: (*["model.layers.{layer}."] * 2, *["decoder.layers.{layer}."] * 2),
    Scope.EXPERT: (
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.",
        "model.layers.{layer}.mlp.experts.",
        "decoder.layers.{layer}.mlp.experts.",
        "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.",
    ),
}


def _row(scope: Scope, layout: Layout, disk: str, memory: str, te: str, local: str) -> Row:
    """A row of the table: names in a cell are separated by blanks; "=" repeats the cell to the left."""
    memory = disk if memory == "=" else memory
    local = te if local == "=" else local
    cells = zip(Dialect, _PREFIXES[scope], (disk, memory, te, local), strict=True)
    return Row(
        scope, layout, {dialect: tuple(prefix + name for name in cell.split()) for dialect, prefix, cell in cells}
    )


_QKV = "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight"
_BIAS = "e_score_correction_bias"

# fmt: off
TABLE: tuple[Row, ...] = (
    #    scope         layout                  HF on disk                         HF in memory          Megatron, TE spec                             Megatron, local spec
    _row(Scope.MODEL,  Layout.VOCABULARY,      "model.embed_tokens.weight",       "=",                  "embedding.word_embeddings.weight",           "="),
    _row(Scope.LAYER,  Layout.REPLICATED,      "input_layernorm.weight",          "=",                  "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    _row(Scope.LAYER,  Layout.QKV,             _QKV,                              "=",                  "self_attention.linear_qkv.weight",           "="),
    _row(Scope.LAYER,  Layout.QUERY_HEADS,     "self_attn.q_norm.weight",         "=",                  "self_attention.qk_norm.q_weight",            "="),
    _row(Scope.LAYER,  Layout.KEY_HEADS,       "self_attn.k_norm.weight",         "=",                  "self_attention.qk_norm.k_weight",            "="),
    _row(Scope.LAYER,  Layout.COLUMNS,         "self_attn.o_proj.weight",         "=",                  "self_attention.linear_proj.weight",          "="),
    _row(Scope.LAYER,  Layout.REPLICATED,      "post_attention_layernorm.weight", "=",                  "pre_mlp_layernorm.weight",                   "="),
    _row(Scope.LAYER,  Layout.REPLICATED,      "block_sparse_moe.gate.weight",    "mlp.gate.weight",    "mlp.router.weight",                          "="),
    _row(Scope.LAYER,  Layout.REPLICATED,      f"block_sparse_moe.{_BIAS}",       f"mlp.{_BIAS}",       "mlp.router.expert_bias",                     "="),
    _row(Scope.EXPERT, Layout.GATE_UP,         "w1.weight w3.weight",             "gate_up_proj",       "linear_fc1.weight{expert}",                  "linear_fc1.weight"),
    _row(Scope.EXPERT, Layout.EXPERT_COLUMNS,  "w2.weight",                       "down_proj",          "linear_fc2.weight{expert}",                  "linear_fc2.weight"),
    _row(Scope.MODEL,  Layout.REPLICATED,      "model.norm.weight",               "=",                  "decoder.final_layernorm.weight",             "="),
    _row(Scope.MODEL,  Layout.VOCABULARY,      "lm_head.weight",                  "=",                  "output_layer.weight",                        "="),
)
# fmt: on


class WeightKey(NamedTuple):
    """What a name means: a row of TABLE, the part of it, and the layer and expert (0 where the row has none)."""

    row: Row
    part: int
    layer: int
    expert: int


# A number is an index where it stands alone between dots or ends `weight{expert}`; those in w1 or linear_fc1 are not.
_INDEX = re.compile(r"(?:(?<=\.)|(?<=\.weight))(0|[1-9][0-9]*)(?=\.|$)")
_FIELD = re.compile(r"\{(layer|expert)\}")


def _index_templates(dialect: Dialect) -> dict[str, tuple[Row, int, tuple[str, ...]]]:
    templates: dict[str, tuple[Row, int, tuple[str, ...]]] = {}
    for row in TABLE:
        for part, template in enumerate(row.names[dialect]):
            skeleton = _FIELD.sub("#", template)
            assert skeleton not in templates, f"{template} stands twice in the table"
            templates[skeleton] = (row, part, tuple(_FIELD.findall(template)))
    return templates


_TEMPLATES = {dialect: _index_templates(dialect) for dialect in Dialect}


def find(name: str, dialect: Dialect) -> WeightKey | None:
    """What `name` means in `dialect`; None if it is not a weight's name there."""
    parts = _INDEX.split(name)  # what stands between the indices, and each of them
    match, found = _TEMPLATES[dialect].get("#".join(parts[::2])), parts[1::2]
    if match is None or len(match[2]) != len(found):  # fewer were found: the name itself has a "#"
        return None
    row, part, field_names = match
    indices = dict(zip(field_names, map(int, found), strict=True))
    return WeightKey(row, part, indices.get("layer", 0), indices.get("expert", 0))


def parse(name: str, dialect: Dialect, config: ModelConfig) -> WeightKey:
    """What `name` means in `dialect` for this model.

    Raises:
        ValueError: the dialect has no such name, or its layer or expert is not in the model.
    """
    key = find(name, dialect)
    if key is None:
        raise ValueError(f"{name}: not the name of a MiniMax-M2 weight in dialect {dialect}")
    if key.layer >= config.num_hidden_layers or key.expert >= config.num_local_experts:
        raise ValueError(
            f"{name}: the model has layers 0 to {config.num_hidden_layers - 1} and experts 0 to "
            f"{config.num_local_experts - 1}"
        )
    return key


def instances(config: ModelConfig) -> Iterable[tuple[Row, int, int]]:
    """Every (row, layer, expert) of a model, in the order of TABLE and layer by layer; 0 where there is no such index."""
    for repeats, group in groupby(TABLE, key=lambda row: row.scope is not Scope.MODEL):
        rows = list(group)
        for layer in range(config.num_hidden_layers if repeats else 1):
            for row in rows:
                for expert in range(config.num_local_experts if row.scope is Scope.EXPERT else 1):
                    yield row, layer, expert


def all_names(config: ModelConfig, dialect: Dialect) -> list[str]:
    """Every weight's name in `dialect`, in model order, each once."""
    names = (name for row, layer, expert in instances(config) for name in row.format(dialect, layer, expert))
    return list(dict.fromkeys(names))


def remap(names: Iterable[str], config: ModelConfig, *, source: Dialect, target: Dialect) -> dict[str, tuple[str, ...]]:
    """For each name of the model in `target`, the names in `source` that it is made of, in order.

    Total and reversible: every source name is used, and `remap` the other way relates the same pairs.

    Raises:
        ValueError: `names` is not exactly the model's names in `source`: one is unknown, given twice, or missing.
    """
    counts = Counter(iter(names))  # a mapping's keys, not its values
    for name, count in counts.items():
        parse(name, source, config)
        if count > 1:
            raise ValueError(f"{name}: given {count} times, expected once")
    made_of: dict[str, dict[str, None]] = {}
    for row, layer, expert in instances(config):
        sources, targets = row.format(source, layer, expert), row.format(target, layer, expert)
        for name in sources:
            if name not in counts:
                raise ValueError(f"{name}: missing; the model needs it for {', '.join(targets)}")
        part_by_part = len(sources) == len(targets)
        for part, name in enumerate(targets):
            used = sources[part : part + 1] if part_by_part else sources
            made_of.setdefault(name, {}).update(dict.fromkeys(used))
    return {name: tuple(parts) for name, parts in made_of.items()}
