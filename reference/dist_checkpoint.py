"""Where each weight lies in a megatron-core distributed checkpoint (`torch_dist`).

Such a checkpoint holds global tensors under keys that name neither layer nor expert: all layers' weights of one kind
are one tensor whose first axis is the layer, and whose second axis, for experts, is the expert. Both layer specs and
every parallel layout share these keys, which is why a checkpoint saved at one layout loads at another. Some checkpoints
keep each layer under a key of its own (`non_homogeneous_layers`); then the layer's axis is missing.

Source: megatron-core TransformerBlock.sharded_state_dict, TEGroupedLinear, SequentialMLP, apply_swiglu_sharded_factory.
"""

from collections.abc import Iterator
from typing import NamedTuple

from reference.config import ModelConfig
from reference.names import TABLE, Dialect, Row, Scope, instances
from reference.parallelism import Parallelism
from reference.sharding import Parameter, parameters

# Parts of a Transformer Engine spec's parameter names, and what stands there in a checkpoint's keys.
_KEY_PARTS = (
    ("layers.{layer}.", "layers."),
    ("mlp.experts.", "mlp.experts.experts."),
    ("weight{expert}", "weight"),
    ("qk_norm.q_weight", "q_layernorm.weight"),
    ("qk_norm.k_weight", "k_layernorm.weight"),
)


def _key(row: Row) -> str:
    (key,) = row.names[Dialect.MEGATRON_TE]
    for ours, theirs in _KEY_PARTS:
        key = key.replace(ours, theirs)
    return key


KEYS: dict[Row, str] = {row: _key(row) for row in TABLE}


class Entry(NamedTuple):
    """One weight of the whole model: the tensor `key[*index]`, and which on-disk tensors are stacked in it.

    `leading` are the sizes of the axes that `index` counts along: layers, experts.
    """

    row: Row
    key: str
    index: tuple[int, ...]
    leading: tuple[int, ...]
    parameter: Parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor under `key`."""
        return (*self.leading, *self.parameter.shape)


def entries(config: ModelConfig, *, vocab_divisor: int = 1, layer_keys: bool = False) -> Iterator[Entry]:
    """Every weight of the model in model order; `layer_keys` for a checkpoint that keeps each layer under its own key.

    `vocab_divisor` is what the vocabulary is filled up to a multiple of.
    """
    whole = Parallelism(vocab_divisor=vocab_divisor)
    for (row, layer, expert), parameter in zip(
        instances(config), parameters(config, whole, 0, Dialect.MEGATRON_TE), strict=True
    ):
        axes = () if row.scope is Scope.MODEL else ((layer, config.num_hidden_layers),)
        if row.scope is Scope.EXPERT:
            axes += ((expert, config.num_local_experts),)
        key = KEYS[row]
        if layer_keys and row.scope is not Scope.MODEL:
            key, axes = key.replace("layers.", f"layers.{layer}.", 1), axes[1:]
        yield Entry(row, key, tuple(i for i, _ in axes), tuple(size for _, size in axes), parameter)
