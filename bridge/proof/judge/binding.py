"""Which of a model's parameters is which weight: by its name, and where that is unknown by its place and shape.

A parameter may be more than the shard of the tables: query and key norms in megatron-core's slots have all heads'
weights on every rank, or one head's for all heads.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from reference.config import ModelConfig
from reference.model_class import ModelClass
from reference.parallelism import Parallelism
from reference.sharding import Parameter, parameters, shard
from reference.weights import MODEL_DIALECTS, Dialect, Layout

HEADS = (Layout.QUERY_HEADS, Layout.KEY_HEADS)
# The names that a model of each class may have: either layer spec's, and megatron-core's for its norm slots.
NAMES: dict[ModelClass, tuple[Dialect, ...]] = {
    ModelClass.GPT: (*MODEL_DIALECTS[ModelClass.GPT], Dialect.TORCH_DIST_LAYERS),
    ModelClass.HYBRID: (*MODEL_DIALECTS[ModelClass.HYBRID], Dialect.TORCH_DIST_HYBRID),
}


class Form(StrEnum):
    """How much of a weight a rank's parameter is."""

    SHARD = "its shard"
    WHOLE = "all heads'"
    ONE_HEAD = "one head's"


class Bound(NamedTuple):
    """A weight's share on this rank, as the tables have it, and the model's parameter for it."""

    parameter: Parameter
    name: str
    form: Form


class Bindings(NamedTuple):
    """Every parameter that has a weight, and what is remarkable: `strange` parameters have none, `missing` weights no
    parameter; `guessed` were found by place and shape."""

    bound: list[Bound]
    guessed: list[str]
    strange: list[str]
    missing: list[str]


def held_parameters(config: ModelConfig, layout: Parallelism, rank: int) -> list[Parameter]:
    """The shares of a rank, under the names that our local layer spec gives them."""
    return parameters(config, layout, rank, Dialect.MEGATRON_LOCAL)


def bind(
    states: Sequence[dict[str, Tensor]], model: ModelClass, config: ModelConfig, layout: Parallelism, rank: int
) -> Bindings:
    """Find the parameters of this rank's chunks; `states` are their `model_state`.

    Raises:
        ValueError: a parameter has the name of a weight and the shape of none of its forms.
    """
    held = held_parameters(config, layout, rank)
    names = [
        [parameter.name for parameter in same]
        for same in zip(*(parameters(config, layout, rank, dialect) for dialect in NAMES[model]), strict=True)
    ]
    free = {(chunk, name): tuple(value.shape) for chunk, state in enumerate(states) for name, value in state.items()}
    found: dict[int, Bound] = {}
    for number, parameter in enumerate(held):
        name = next((name for name in names[number] if (parameter.chunk, name) in free), None)
        if name is not None:
            found[number] = Bound(parameter, name, _form(parameter, free.pop((parameter.chunk, name)), config, name))
    guessed = []
    for (chunk, name), shape in list(free.items()):
        fits = [
            number
            for number, parameter in enumerate(held)
            if number not in found
            and parameter.chunk == chunk
            and _place(name) in map(_place, names[number])
            and shape in _forms(parameter, config)
        ]
        if len(fits) == 1:
            (number,) = fits
            found[number] = Bound(held[number], name, _form(held[number], free.pop((chunk, name)), config, name))
            guessed.append(f"{name}: by its place and shape taken for {' + '.join(held[number].sources)}")
    missing = [source for number, parameter in enumerate(held) if number not in found for source in parameter.sources]
    bound = _keys_as_queries([found[number] for number in sorted(found)], config)
    return Bindings(bound, guessed, [name for _, name in free], missing)


def _keys_as_queries(bound: list[Bound], config: ModelConfig) -> list[Bound]:
    """A key norm of one head is a rank's shard where the rank has one key head, unless queries' norms have one head."""
    if not any(one.form is Form.ONE_HEAD and one.parameter.row.layout is Layout.QUERY_HEADS for one in bound):
        return bound
    one_head = [one.parameter.row.layout in HEADS and one.parameter.shape == (config.head_dim,) for one in bound]
    return [one._replace(form=Form.ONE_HEAD) if is_one else one for one, is_one in zip(bound, one_head, strict=True)]


def _place(name: str) -> tuple[str, ...]:
    """The layer, and which half of it; in HybridModel the layer says it."""
    return tuple(name.split(".")[:4])


def _forms(parameter: Parameter, config: ModelConfig) -> dict[tuple[int, ...], Form]:
    shard_form = {tuple(parameter.shape): Form.SHARD}
    if parameter.row.layout not in HEADS:
        return shard_form
    return {(config.head_dim,): Form.ONE_HEAD, parameter.row.shapes(config)[0]: Form.WHOLE} | shard_form


def _form(parameter: Parameter, shape: tuple[int, ...], config: ModelConfig, name: str) -> Form:
    forms = _forms(parameter, config)
    if shape not in forms:
        expected = " or ".join(f"{list(size)} ({form})" for size, form in forms.items())
        raise ValueError(f"{name}: found shape {list(shape)}, expected {expected}")
    return forms[shape]


@torch.no_grad()
def load(bound: Bound, target: Tensor, weights: dict[str, Tensor]) -> None:
    """Fill a parameter from whole weights."""
    source = weights[bound.parameter.sources[0]]
    values: dict[Form, Callable[[], Tensor]] = {
        Form.SHARD: lambda: shard(bound.parameter, weights),
        Form.WHOLE: lambda: source,
        Form.ONE_HEAD: lambda: source[: len(target)],
    }
    target.copy_(values[bound.form]())


def share(bound: Bound, value: Tensor) -> Tensor:
    """A copy of this rank's share of a parameter or its gradient; one head's stays what it is."""
    own = slice(*bound.parameter.pieces[0].rows) if bound.form is Form.WHOLE else slice(None)
    return value[own].detach().to("cpu", torch.float32, copy=True)
