"""The weights of a running model under their on-disk names, as a stream: for saving, and for weight sync in RL.

They come in rounds. Each gathers a few tensors on the ranks that want them (`bridge.weights.gather`) and encodes them
there (`bridge.weights.encode`). If that fails on one rank, every rank raises, and none has yielded the round's tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import raise_on_all_ranks
from bridge.weights.encode import WeightEncoder
from bridge.weights.gather import GatherRequest, gather_tensors, rounds
from bridge.weights.shard_map import ShardMap, Source, spread
from bridge.weights.sharded_model import ShardedModel
from bridge.weights.to_host import to_host

To = Literal["all", "spread"] | int | Mapping[str, int]


def export_weights(
    sharded: ShardedModel,
    encoder: WeightEncoder,
    to: To = "all",
    *,
    device: str | torch.device | None = None,
    progress: Progress = no_progress,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), in model order, for each tensor that this rank gets; every rank must iterate to the end.

    Args:
        sharded: the model.
        encoder: makes of each weight what is stored of it.
        to: which rank gets a tensor: "all" of them; one rank for every tensor; "spread", a rank that holds a piece of
            it, so that all get about as many elements; or a rank for each name.
        device: "cpu" for results in host memory; None leaves them where the parameters are.
        progress: shows progress, by rounds.

    Raises:
        ValueError: `to` names no rank; a value is not finite where float8 is wanted; a source file changed. All ranks
            raise the same.
    """
    rank_of = _destination(to, sharded.shard_map)
    sources = sharded.shard_map.sources
    requests = [GatherRequest(source, encoder.value_dtype(source), rank_of(source)) for source in sources]
    stored = _stream(requests, sharded, encoder, progress)
    on_host = device is not None and torch.device(device).type == "cpu"
    return to_host(stored) if on_host else chain.from_iterable(stored)


def _stream(
    requests: list[GatherRequest],
    sharded: ShardedModel,
    encoder: WeightEncoder,
    progress: Progress,
) -> Iterator[list[tuple[str, Tensor]]]:
    """The (name, tensor) pairs of one round after another."""
    batches = rounds(requests)
    for batch in progress(batches, "export", len(batches)):
        gathered = gather_tensors(batch, sharded)
        with raise_on_all_ranks(), torch.no_grad():
            stored = encoder.stored(gathered)
        yield stored


def _destination(to: To, shard_map: ShardMap) -> Callable[[Source], int | None]:
    """The rank that gets a tensor; None for all ranks."""
    world = shard_map.parallelism.world_size
    if to == "all":
        return lambda source: None
    if to == "spread":
        to = spread(shard_map, shard_map.sources)
    if isinstance(to, Mapping):
        return lambda source: to[source.name]
    if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < world:
        raise ValueError(f"to must be 'all', 'spread', or a rank from 0 to {world - 1}, found {to!r}")
    return lambda source: to
