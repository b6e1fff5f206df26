"""Whole tensors under Hugging Face's names, put together from what the ranks hold."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.proof.judge.binding import Form, held_parameters
from bridge.proof.judge.observe import Key, Observation
from reference.config import ModelConfig
from reference.outcome import Outcome
from reference.parallelism import Parallelism
from reference.sharding import placements, unshard


class Gathered(NamedTuple):
    """What all ranks saw together.

    `losses` and `norms` have an entry for each step. `gradients` are the first step's; one of a norm with one head's
    weights is that of the head's. `replicas` says, for each tensor that several ranks hold, how far their gradients
    are from each other, relative to their size.
    """

    logits: Tensor
    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    one_head: frozenset[str]
    replicas: dict[str, float]

    @property
    def outcome(self) -> Outcome:
        """Of the first step."""
        return Outcome(self.logits, torch.tensor(self.losses[0]), self.gradients)


def gather(ranks: Sequence[Observation], config: ModelConfig, sizes: Parallelism) -> Gathered:
    """Put together what the ranks of a layout saw; what no rank has a parameter for is left out."""
    losses = [
        [loss for loss in of_step if loss is not None] for of_step in zip(*(r.losses for r in ranks), strict=True)
    ]
    one_head = frozenset(
        bound.parameter.sources[0] for r in ranks for bound in r.bindings.bound if bound.form is Form.ONE_HEAD
    )
    return Gathered(
        ranks[0].logits,
        [sum(of_step) / len(of_step) for of_step in losses],
        ranks[0].norms,
        _whole([r.gradients for r in ranks], config, sizes, one_head),
        _whole([r.weights for r in ranks], config, sizes, one_head),
        one_head,
        _replicas([r.gradients for r in ranks], config, sizes),
    )


def _whole(
    ranks: Sequence[dict[Key, Tensor]], config: ModelConfig, sizes: Parallelism, one_head: frozenset[str]
) -> dict[str, Tensor]:
    values = {(rank, *key): value for rank, of_rank in enumerate(ranks) for key, value in of_rank.items()}
    placed = placements({rank: held_parameters(config, sizes, rank) for rank in range(sizes.world_size)})
    found = {}
    for source, places in placed.items():
        keys = [(place.rank, place.chunk, place.name) for place in places]
        if all(key in values for key in keys):
            found[source] = values[keys[0]] if source in one_head else unshard(places, values)
    return found


def _replicas(ranks: Sequence[dict[Key, Tensor]], config: ModelConfig, sizes: Parallelism) -> dict[str, float]:
    first: dict[tuple, Tensor] = {}
    found: dict[str, float] = {}
    for rank, of_rank in enumerate(ranks):
        for pieces, value in _held(of_rank, config, sizes, rank):
            other = first.setdefault(pieces, value)
            if other is not value:
                error = ((value - other).norm() / max(value.norm(), other.norm())).nan_to_num(0.0).item()
                for piece in pieces:
                    found[piece.source] = max(error, found.get(piece.source, 0.0))
    return found


def _held(
    of_rank: dict[Key, Tensor], config: ModelConfig, sizes: Parallelism, rank: int
) -> Iterator[tuple[tuple, Tensor]]:
    """The pieces of each parameter of a rank, and its value."""
    for parameter in held_parameters(config, sizes, rank):
        key = parameter.chunk, parameter.name
        if key in of_rank:
            yield parameter.pieces, of_rank[key]
