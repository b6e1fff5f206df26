"""Collecting tensors that ranks hold in pieces: one message a round between any two ranks, however many pieces.

A round is a list of tensors and where each is requests: on one rank, or on all. A piece that several ranks hold is sent
by one of them, by the one that wants it if that is among them, and else by each in turn. All pieces from one rank to
another lie in one flat buffer of bytes, which goes by point-to-point; what all ranks want is broadcast by each rank
that has some of it. A rank that neither has nor wants a piece takes no part in moving it.
"""

import math
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from bridge.weights.shard_map import Replicas, Source
from bridge.weights.sharded_model import ShardedModel

ROUND_BYTES = 128 << 20
_ALIGNMENT = 16


class GatherRequest(NamedTuple):
    """A tensor, the dtype in which it is collected, and the rank that wants it (None: all do)."""

    source: Source
    dtype: torch.dtype
    rank: int | None


class _Segment(NamedTuple):
    """A piece of a tensor of the round, and its bytes in the message."""

    index: int
    replicas: Replicas
    start: int
    stop: int


def rounds(requests: list[GatherRequest], limit: int = ROUND_BYTES) -> list[list[GatherRequest]]:
    """Tensors in rounds of at most `limit` bytes (or one tensor) for each rank; each rank's own come in order.

    Ranks' lists go side by side, so that all of them have work in each round.
    """
    lists: dict[int | None, list[list[GatherRequest]]] = {}
    filled: dict[int | None, int] = {}
    for one in requests:
        nbytes = math.prod(one.source.shape) * one.dtype.itemsize
        if filled.get(one.rank, limit) + nbytes > limit:
            lists.setdefault(one.rank, []).append([])
            filled[one.rank] = 0
        lists[one.rank][-1].append(one)
        filled[one.rank] += nbytes
    return [[one for part in parts for one in part] for parts in zip_longest(*lists.values(), fillvalue=())]


@torch.no_grad()
def gather_tensors(requests: list[GatherRequest], sharded: ShardedModel) -> list[tuple[Source, Tensor]]:
    """One round; gives what this rank wants, in order. All ranks must call it with the same list.

    A tensor that this rank holds whole in the right dtype comes as a view of its parameter.
    """
    exchange = _Exchange(sharded)
    messages = exchange.messages(requests)
    moving = {route: segments for route, segments in messages.items() if exchange.moves(route)}
    buffers = {route: exchange.buffer(route, segments, requests) for route, segments in moving.items()}
    _move(buffers, sharded.rank)
    pieces: dict[int, list[tuple[Replicas, Tensor]]] = {}
    for route, segments in messages.items():
        if route[1] in (None, sharded.rank):
            for segment in segments:
                piece = exchange.received(segment, requests[segment.index], route, buffers.get(route))
                pieces.setdefault(segment.index, []).append((segment.replicas, piece))
    return [(requests[index].source, _assembled(requests[index], pieces[index])) for index in sorted(pieces)]


Route = tuple[int, int | None]  # from, to


class _Exchange:
    """This rank's side of a round."""

    def __init__(self, sharded: ShardedModel):
        self._sharded, self._shard_map = sharded, sharded.shard_map

    def moves(self, route: Route) -> bool:
        return route[0] != route[1] and distributed.get_world_size() > 1

    def messages(self, requests: list[GatherRequest]) -> dict[Route, list[_Segment]]:
        """What each message has in it that this rank sends or receives."""
        found: dict[Route, list[_Segment]] = {}
        for index, (source, dtype, to) in enumerate(requests):
            for replicas in self._shard_map.replicas(source):
                sender = to if to in replicas.ranks else replicas.ranks[index % len(replicas.ranks)]
                if to is None or self._sharded.rank in (sender, to):
                    segments = found.setdefault((sender, to), [])
                    start = -(-segments[-1].stop // _ALIGNMENT) * _ALIGNMENT if segments else 0
                    segments.append(
                        _Segment(index, replicas, start, start + math.prod(_shape(replicas)) * dtype.itemsize)
                    )
        return found

    def buffer(self, route: Route, segments: list[_Segment], requests: list[GatherRequest]) -> Tensor:
        buffer = torch.empty(segments[-1].stop, dtype=torch.uint8, device=self._sharded.device)
        if route[0] == self._sharded.rank:
            for segment in segments:
                one = requests[segment.index]
                _view(buffer, segment, one.dtype).copy_(self._held(one.source, segment.replicas))
        return buffer

    def received(self, segment: _Segment, one: GatherRequest, route: Route, buffer: Tensor | None) -> Tensor:
        if route[0] == self._sharded.rank:
            return self._held(one.source, segment.replicas)
        assert buffer is not None
        return _view(buffer, segment, one.dtype)

    def _held(self, source: Source, replicas: Replicas) -> Tensor:
        value = self._sharded.state[self._shard_map.parameter(source)].detach()
        return value[replicas.start : replicas.start + replicas.rows[1] - replicas.rows[0]]


def _move(buffers: dict[Route, Tensor], me: int) -> None:
    sends_and_receives = []
    for (sender, to), buffer in sorted(buffers.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        if to is None:
            distributed.broadcast(buffer, sender)
        elif sender == me:
            sends_and_receives.append(distributed.P2POp(distributed.isend, buffer, to))
        else:
            sends_and_receives.append(distributed.P2POp(distributed.irecv, buffer, sender))
    if sends_and_receives:
        for work in distributed.batch_isend_irecv(sends_and_receives):
            work.wait()


def _assembled(one: GatherRequest, pieces: list[tuple[Replicas, Tensor]]) -> Tensor:
    if len(pieces) == 1:
        return pieces[0][1].to(one.dtype)
    whole = torch.empty(one.source.shape, dtype=one.dtype, device=pieces[0][1].device)
    for replicas, piece in pieces:
        place = whole[slice(*replicas.rows)]
        (place if replicas.cols is None else place[:, slice(*replicas.cols)]).copy_(piece)
    return whole


def _view(buffer: Tensor, segment: _Segment, dtype: torch.dtype) -> Tensor:
    return buffer[segment.start : segment.stop].view(dtype).view(_shape(segment.replicas))


def _shape(replicas: Replicas) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in filter(None, (replicas.rows, replicas.cols)))
