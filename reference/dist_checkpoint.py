"""Where each weight lies in a megatron-core distributed checkpoint (`torch_dist`).

Such a checkpoint holds whole tensors, under keys that have no number for the layer or the expert: all layers' weights
of one kind are one tensor, whose first axis is the layer and, for experts, whose second axis is the expert. Both layer
specs and every parallel layout have the same keys (`Dialect.TORCH_DIST`), so that a checkpoint saved at one layout
loads at another. Some checkpoints of a `GPTModel` keep each layer under a key of its own (megatron-core's
`non_homogeneous_layers`, `Dialect.TORCH_DIST_LAYERS`), and those of a `HybridModel` always do
(`Dialect.TORCH_DIST_HYBRID`); their tensors have no axis for the layer.

Source: megatron-core TransformerBlock.sharded_state_dict, HybridStack.sharded_state_dict, TEGroupedLinear,
SequentialMLP, apply_swiglu_sharded_factory.
"""

from collections.abc import Container, Iterator
from itertools import chain
from typing import NamedTuple

from reference.config import ModelConfig
from reference.parallelism import Parallelism
from reference.sharding import Parameter, parameters
from reference.weights import CHECKPOINT_DIALECTS, TABLE, Dialect, Row, Scope, instances


class Entry(NamedTuple):
    """One weight of the whole model: it is `key[*index]`, and `parameter` says which on-disk tensors it is made of.

    `leading` are the sizes of the axes that `index` selects from: layers, experts.
    """

    row: Row
    key: str
    index: tuple[int, ...]
    leading: tuple[int, ...]
    parameter: Parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor under `key`."""
        return (*self.leading, *self.parameter.shape)


def dialect_of(keys: Container[str]) -> Dialect:
    """The dialect that most of the first layer's keys and of the model's own keys belong to."""

    def found(dialect: Dialect) -> int:
        return sum(row.format(dialect, 0, 0)[0] in keys for row in TABLE)

    return max(chain(*CHECKPOINT_DIALECTS.values()), key=found)  # the first of equals


def entries(config: ModelConfig, *, vocab_divisor: int = 1, dialect: Dialect = Dialect.TORCH_DIST) -> Iterator[Entry]:
    """Every weight of the model, in model order, under its key in `dialect`, one of `CHECKPOINT_DIALECTS`.

    The vocabulary is filled up to a multiple of `vocab_divisor`.
    """
    whole = parameters(config, Parallelism(vocab_divisor=vocab_divisor), 0, Dialect.MEGATRON_TE)
    for (row, layer, expert), parameter in zip(instances(config), whole, strict=True):
        axes: list[tuple[int, int]] = []  # index and size
        if row.scope is not Scope.MODEL and dialect is Dialect.TORCH_DIST:
            axes.append((layer, config.num_hidden_layers))
        if row.scope is Scope.EXPERT:
            axes.append((expert, config.num_local_experts))
        (key,) = row.format(dialect, layer, expert)
        yield Entry(row, key, tuple(index for index, _ in axes), tuple(size for _, size in axes), parameter)
