"""Names of weights: what one means in a dialect, every name of a model, and which names become which elsewhere.

The names stand in `reference.weights.TABLE`. Scales of quantised tensors are not weights and have no row: on disk they
are `<name>_scale_inv`.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from reference.config import ModelConfig
from reference.weights import LAYER_NUMBERS, TABLE, Dialect, Row, instances

SCALE_SUFFIX = "_scale_inv"


class WeightKey(NamedTuple):
    """What a name means: a row of TABLE, the part of it, and the layer and expert (0 where the row has none)."""

    row: Row
    part: int
    layer: int
    expert: int


# A number is an index where it stands alone between dots or ends `weight{expert}`; those in w1 or linear_fc1 are not.
_INDEX = re.compile(r"(?:(?<=\.)|(?<=\.weight))(0|[1-9][0-9]*)(?=\.|$)")
_FIELD = re.compile(rf"\{{({'|'.join(LAYER_NUMBERS)}|expert)\}}")


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
    layer = expert = 0
    for field, number in zip(field_names, map(int, found), strict=True):
        if field == "expert":
            expert = number
            continue
        step, first = LAYER_NUMBERS[field]
        layer, rest = divmod(number - first, step)
        if rest:  # attention in an odd layer of HybridModel, or experts in an even one
            return None
    return WeightKey(row, part, layer, expert)


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


def all_names(config: ModelConfig, dialect: Dialect) -> list[str]:
    """The names of all weights in `dialect`, in model order, each once (several weights may be stacked under one)."""
    names = (name for row, layer, expert in instances(config) for name in row.format(dialect, layer, expert))
    return list(dict.fromkeys(names))


def remap(names: Iterable[str], config: ModelConfig, *, source: Dialect, target: Dialect) -> dict[str, tuple[str, ...]]:
    """For each name of the model in `target`, the names in `source` that it is made of, in order.

    Every name in `names` is used, and `remap` in the other direction relates the same pairs of names.

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
