"""Mappings between Hugging Face tensors and the parameters of one rank's megatron-core model.

Nothing is decided here: `reference.sharding` says which pieces make up a parameter, `reference.weights` what they are
called.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from bridge.weights.wrappers import unwrapped_name
from reference.config import ModelConfig
from reference.names import find
from reference.sharding import Parallelism, Parameter, parameters, placements, shard, unshard
from reference.weights import Dialect, Layout, Row


class ParamMapping:
    """One parameter of a rank and the on-disk tensors it is made of, in both directions.

    `roles` says what each of those tensors is in the parameter, such as "q".
    """

    roles: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, parameter: Parameter):
        self.parameter = parameter

    @property
    def megatron_param(self) -> str:
        """The parameter's name on its rank."""
        return self.parameter.name

    @property
    def hf_params(self) -> tuple[str, ...]:
        """The on-disk tensors, in the order in which they are fused."""
        return self.parameter.sources

    @property
    def hf_param(self) -> dict[str, str]:
        """The on-disk tensors by role."""
        return dict(zip(self.roles, self.hf_params, strict=True))

    def hf_to_megatron(self, tensors: dict[str, Tensor]) -> Tensor:
        """The rank's value, cut from whole dequantised tensors.

        Raises:
            ValueError: a tensor is missing.
        """
        return shard(self.parameter, tensors)

    def megatron_to_hf(self, value: Tensor) -> dict[str, Tensor]:
        """The parameter's piece of each on-disk tensor, by the tensor's name: all of it at one rank.

        Raises:
            ValueError: the value's shape is not the parameter's.
        """
        _check_shape(self.megatron_param, value, self.parameter.shape)
        held = {(0, self.parameter.chunk, self.megatron_param): value}
        return {source: unshard(places, held) for source, places in placements({0: [self.parameter]}).items()}


class QKVMapping(ParamMapping):
    """Query, key and value projections in one matrix: for each key/value group its query heads, its key, its value."""

    roles = ("q", "k", "v")


class GatedMLPMapping(ParamMapping):
    """An expert's gate projection above its up projection; an expert-tensor-parallel rank has its rows of both."""

    roles = ("gate", "up")


class FullDimQKNormMapping(ParamMapping):
    """The weight of a norm over all heads; a rank has that of its heads, and ranks that share a key head the same.

    Of a drop-in norm each rank has all of it.
    """


MAPPINGS: dict[Layout, type[ParamMapping]] = {
    Layout.QKV: QKVMapping,
    Layout.GATE_UP: GatedMLPMapping,
    Layout.QUERY_HEADS: FullDimQKNormMapping,
    Layout.KEY_HEADS: FullDimQKNormMapping,
}


class MappingRegistry:
    """The mappings of every parameter of one rank, in model order."""

    def __init__(self, config: ModelConfig, dialect: Dialect, parallelism: Parallelism | None = None, rank: int = 0):
        self.config, self.dialect, self.parallelism, self.rank = config, dialect, parallelism or Parallelism(), rank
        held = parameters(config, self.parallelism, rank, dialect)
        self._by_name = {(p.chunk, p.name): MAPPINGS.get(p.row.layout, ParamMapping)(p) for p in held}
        self._by_source = {source: mapping for mapping in self for source in mapping.hf_params}

    def __iter__(self) -> Iterator[ParamMapping]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def megatron_to_hf_lookup(self, name: str, chunk: int = 0) -> ParamMapping:
        """The mapping of a parameter.

        Raises:
            ValueError: the rank has no such parameter.
        """
        if (chunk, name) not in self._by_name:
            raise ValueError(f"{name}: this rank holds no such parameter in chunk {chunk} ({self.dialect} names)")
        return self._by_name[chunk, name]

    def hf_to_megatron_lookup(self, name: str) -> ParamMapping:
        """The mapping that an on-disk tensor goes into.

        Raises:
            ValueError: no parameter of this rank is made of it.
        """
        if name not in self._by_source:
            raise ValueError(f"{name}: no parameter of this rank is made of it")
        return self._by_source[name]

    def bind(self, states: Sequence[dict[str, Tensor]]) -> dict[tuple[int, str], Tensor]:
        """Values by (chunk, name), from the `model_state` of each of this rank's chunks.

        Raises:
            ValueError: the model has another parameter, lacks one, or has one of another shape.
        """
        state = {(chunk, name): value for chunk, held in enumerate(states) for name, value in held.items()}
        for (chunk, name), mapping in self._by_name.items():
            if (chunk, name) not in state:
                raise ValueError(f"{name}: the model lacks this parameter; build it with bridge.build_model")
            remedy = NORM_OF_OTHER_SHAPE if isinstance(mapping, FullDimQKNormMapping) else OTHER_SIZES
            _check_shape(name, state[chunk, name], mapping.parameter.shape, remedy)
        unknown = state.keys() - self._by_name.keys()
        if unknown:
            raise ValueError(
                f"{min(unknown)[1]}: the model has this parameter, MiniMax-M2 does not ({len(unknown)} such)"
            )
        return state


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; megatron-core's `_extra_state` entries are left out."""
    state = model.state_dict(keep_vars=True)
    return {
        unwrapped_name(name): value
        for name, value in state.items()
        if isinstance(value, Tensor) and "_extra_state" not in name
    }


OTHER_SIZES = "model and checkpoint have different sizes"
NORM_OF_OTHER_SHAPE = (
    "MiniMax-M2 norms all heads at once, where megatron-core's own norm has the weight of one head, and others' that "
    "of a rank's heads: use bridge.minimax_m2_layer_spec, or put bridge.FullDimQNorm and bridge.FullDimKNorm into the "
    "slots q_layernorm and k_layernorm"
)


def model_rows(names: Sequence[str], dialects: Sequence[Dialect]) -> dict[Dialect, tuple[Row, ...]]:
    """The row of `reference.weights.TABLE` of each name, for each of `dialects` that has all the names.

    Raises:
        ValueError: a name is in none of them, or no layer spec has these names together.
    """
    keys = {dialect: [find(name, dialect) for name in names] for dialect in dialects}
    known = [{dialect for dialect in dialects if keys[dialect][index]} for index in range(len(names))]
    common = set(dialects)
    for index, (name, mine) in enumerate(zip(names, known, strict=True)):
        if not mine:
            raise ValueError(f"{name}: not a parameter of a MiniMax-M2 model; build it with bridge.build_model")
        common &= mine
        if not common:
            other = next(earlier for earlier in range(index) if not mine & known[earlier])
            raise ValueError(
                f"{name}: found beside {names[other]}, but the one is a name in {_listed(mine)}, the other in "
                f"{_listed(known[other])}; give all layers one spec, with one kind of norm for queries and keys, and "
                "experts that go with it (grouped with Transformer Engine, one by one without)"
            )
    return {
        dialect: tuple(key.row for key in keys[dialect] if key is not None) for dialect in dialects if dialect in common
    }


def _listed(dialects: set[Dialect]) -> str:
    return " and ".join(sorted(dialects))


def _check_shape(name: str, value: torch.Tensor, expected: tuple[int, ...], remedy: str = OTHER_SIZES) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: found shape {list(value.shape)}, expected {list(expected)}; {remedy}")
