"""Mappings between Hugging Face tensors and the parameters of one rank's megatron-core model.

Nothing is decided here: which pieces make up a parameter is `reference.sharding`'s, what they are called is
`reference.names`'.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reference.config import ModelConfig
from reference.names import Dialect, find
from reference.sharding import Parallelism, Parameter, parameters, placements, shard, unshard


class ParamMapping:
    """One parameter of a rank and the on-disk tensors it is made of, in both directions."""

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

    def hf_to_megatron(self, tensors: dict[str, Tensor]) -> Tensor:
        """The rank's value, cut from whole dequantised tensors.

        Raises:
            ValueError: a tensor is missing.
        """
        return shard(self.parameter, tensors)

    def megatron_to_hf(self, value: Tensor) -> dict[str, Tensor]:
        """The whole on-disk tensors out of a value that holds all of them (tensor parallel size 1).

        Raises:
            ValueError: the value's shape is not the parameter's.
        """
        _check_shape(self.megatron_param, value, self.parameter.shape)
        held = {(0, self.parameter.chunk, self.megatron_param): value}
        return {source: unshard(places, held) for source, places in placements({0: [self.parameter]}).items()}


class MappingRegistry:
    """The mappings of every parameter of one rank, in model order."""

    def __init__(self, config: ModelConfig, dialect: Dialect, parallelism: Parallelism | None = None, rank: int = 0):
        self.dialect = dialect
        held = parameters(config, parallelism or Parallelism(), rank, dialect)
        self._by_name = {(parameter.chunk, parameter.name): ParamMapping(parameter) for parameter in held}
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

    def bind(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers by name, proven to be exactly those of the registry.

        Raises:
            ValueError: the model has another parameter, lacks one, or has one of another shape.
        """
        state = model_state(model)
        for mapping in self:
            name = mapping.megatron_param
            if name not in state:
                raise ValueError(f"{name}: the model lacks this parameter; build it with minimax_m2_layer_spec")
            _check_shape(name, state[name], mapping.parameter.shape)
        unknown = state.keys() - {mapping.megatron_param for mapping in self}
        if unknown:
            raise ValueError(f"{min(unknown)}: the model has this parameter, MiniMax-M2 does not ({len(unknown)} such)")
        return state


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under their own names; megatron-core's `_extra_state` entries are left out."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and "_extra_state" not in name}


def model_dialect(model: nn.Module) -> Dialect:
    """Which layer spec a model was built from, by its parameters' names.

    Raises:
        ValueError: neither the Transformer Engine nor the local spec of MiniMax-M2.
    """
    names = model_state(model).keys()
    for dialect in (Dialect.MEGATRON_TE, Dialect.MEGATRON_LOCAL):
        if all(find(name, dialect) for name in names):
            return dialect
    unknown = next(name for name in names if not find(name, Dialect.MEGATRON_LOCAL))
    raise ValueError(f"{unknown}: not a parameter of a MiniMax-M2 model; build it with minimax_m2_layer_spec")


def _check_shape(name: str, value: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name}: found shape {list(value.shape)}, expected {list(expected)}; model and checkpoint have different "
            "sizes, or the model is sharded and this process holds one shard"
        )
